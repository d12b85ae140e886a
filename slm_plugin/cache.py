"""What the cache folder holds: computed values under keys, in one file for all that they depend on.

A file's name is a hash of what its values depend on: model, data, versions. Each value is one line
of JSON, appended as soon as it is computed, so an interrupted computation resumes. Each line has a
checksum over itself and over that hash. A file with edited, truncated or foreign lines is reported
and set aside; its valid lines are copied to a new file, and the other values are computed again.
Several processes may write one file: lines are appended atomically, and none is ever deleted.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from slm_plugin.errors import OutputError
from slm_plugin.progress import say

# Largest file that is read, in bytes.
LARGEST = 1 << 31


def hashed(facts: Iterable[object]) -> str:
    """SHA-256 over what all values of a store depend on."""
    return hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()


class Store:
    """Values by keys, both plain data as JSON has them.

    Args:
        path: The file; None holds the values in memory only.
        about: Hash of everything that the values depend on beside their keys. Lines with another
            hash are damage.
        valid: Whether a key has a value of this kind; other lines are damage.
        writable: Values will be added; else a damaged file is reported and left where it is.

    Raises:
        OutputError: The file cannot be read or written.
    """

    def __init__(
        self,
        path: Path | None = None,
        about: str = "",
        valid: Callable[[Any, Any], bool] = lambda key, value: True,
        *,
        writable: bool = True,
    ) -> None:
        self.path = path
        self._about = about
        self._valid = valid
        self._writable = writable
        # By the key's JSON, because keys may be lists.
        self._values: dict[str, tuple[Any, Any]] = {}
        self._file: int | None = None
        if path is None:
            return
        try:
            good = self._read(path)
            if writable:
                self._open(path, good)
        except OSError as error:
            raise self._unwritable(error) from error

    @classmethod
    def of(
        cls,
        folder: Path,
        about: str,
        valid: Callable[[Any, Any], bool] = lambda key, value: True,
        *,
        writable: bool = True,
    ) -> Store:
        """The store in a folder whose name is the hash of what its values depend on."""
        return cls(folder / f"{about[:24]}.jsonl", about, valid, writable=writable)

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)

    def items(self) -> list[tuple[Any, Any]]:
        """All keys with their values, in the order in which the keys were first stored."""
        return list(self._values.values())

    def find(self, key: Any) -> Any:
        """The value that was stored last under a key; None where there is none."""
        return self._values.get(json.dumps(key), (key, None))[1]

    def store(self, key: Any, value: Any) -> None:
        """Add a value, and write it to disk at once.

        Raises:
            OutputError: The disk is full.
        """
        if self._file is not None:
            line = (json.dumps({"key": key, "value": value, "sum": self._sum(key, value)})).encode()
            try:
                # A single write, so that lines of several processes do not mix and an
                # interruption truncates at most the last line.
                if os.write(self._file, line + b"\n") != len(line) + 1:
                    os.write(self._file, b"\n")
                    raise OSError(0, "the disk is full")
            except OSError as error:
                raise self._unwritable(error) from error
        self._values[json.dumps(key)] = (key, value)

    def _sum(self, key: Any, value: Any) -> str:
        return hashlib.sha256(json.dumps([self._about, key, value]).encode()).hexdigest()[:16]

    def _open(self, path: Path, good: bytes) -> None:
        """Open the file for appending, with its valid lines if it was set aside."""
        path.parent.mkdir(parents=True, exist_ok=True)
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
        self._file = os.open(path, flags, 0o644)
        if good:
            os.write(self._file, good)

    def _read(self, path: Path) -> bytes:
        """Read a file; returns its valid lines if it was damaged and set aside."""
        content = _content(path)
        lines = [line for line in re.split(rb"(?<=\n)", content or b"") if line]
        good = [line for line in lines if line.endswith(b"\n") and self._add(line)]
        damaged = len(lines) - len(good)
        if not damaged and content is not None:
            return b""
        what = f"{damaged} of {len(lines)} lines" if lines else "it is not a readable file"
        if not self._writable:
            say(f"  the cache file {path} is damaged ({what})")
            return b""
        aside = _set_aside(path)
        if aside is not None:
            say(
                f"  the cache file {path} is damaged ({what}) and was set aside as {aside.name}; "
                "missing values are computed again"
            )
        return b"".join(good)

    def _add(self, line: bytes) -> bool:
        """Take the value of a line; False where it is damaged or foreign."""
        try:
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if entry["sum"] != self._sum(key, value) or not self._valid(key, value):
                return False
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return False
        self._values[json.dumps(key)] = (key, value)
        return True

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write the cache file {self.path}: {error.strerror or error}",
            hint="free some space there or set SLM_PLUGIN_CACHE to another folder",
        )


def _set_aside(path: Path) -> Path | None:
    """Rename a damaged file to the first free name as ``NAME.damaged-1``.

    Returns:
        The new name; None where another process was faster.

    Raises:
        OSError: It cannot be renamed.
    """
    names = (path.with_name(f"{path.name}.damaged-{number}") for number in itertools.count(1))
    free = next(name for name in names if not os.path.lexists(name))
    try:
        path.rename(free)
    except FileNotFoundError:
        return None
    return free


def _content(path: Path) -> bytes | None:
    """The bytes of a file; None where its path is not a regular file."""
    try:
        status = path.stat()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return None
        if error.errno == errno.ENOENT:
            return b""
        raise
    if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST:
        return None
    content = path.read_bytes()
    if content and not content.endswith(b"\n"):
        # Another process may be writing at this moment.
        time.sleep(0.01)
        content = path.read_bytes()
    return content
