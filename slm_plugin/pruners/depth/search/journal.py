"""A journal of trials: a cache file with the values that searches have measured.

Values are stored per sample in the order of measurement. An interrupted search therefore resumes
and ends with the same plan, and searches with other targets share the trials.

Each line has a checksum over itself and over the key of the journal. A journal with edited,
truncated or foreign lines is reported and set aside; its valid lines are copied to a new file, and
the other values are measured again. Several processes may write one journal: lines are appended
atomically, and none is ever deleted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import stat
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import slm_plugin
from slm_plugin.cache import checksum, set_aside
from slm_plugin.errors import OutputError
from slm_plugin.lazy import torch
from slm_plugin.progress import say
from slm_plugin.pruners.depth.search.runs import Run, Runs

if TYPE_CHECKING:
    from slm_plugin.session import Session

# Largest journal that is read, in bytes; a line has a few hundred.
LARGEST = 1 << 31


def journal_of(session: Session, criterion: str) -> Journal:
    """The journal of a model, a calibration set and a criterion.

    It is a file in the session's journal folder, named by a hash of everything that a value depends
    on. Without such a folder it is held in memory.

    Raises:
        OutputError: The file cannot be written.
    """
    if session.journals is None or session.digest is None:
        return Journal()
    facts = (
        session.fingerprint().model_dump_json(),
        session.digest,
        criterion,
        session.batch_tokens,
        session.model.device,
        torch.get_num_threads(),
        torch.__version__,
        slm_plugin.__version__,
    )
    about = hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()
    return Journal(session.journals / f"{about[:24]}.jsonl", about)


class Journal:
    """Values of trials by their runs: a list for every part of the samples.

    Attributes:
        path: The file; None where the values are held in memory only.
        read_from_disk: Number of trials in the file.

    Args:
        path: JSON lines, one per measured part; None holds the values in memory only.
        about: Hash of everything that a value depends on beside the runs. Lines with another hash
            are ignored.

    Raises:
        OutputError: The file cannot be read or written.
    """

    def __init__(self, path: Path | None = None, about: str = "") -> None:
        self.path = path
        self.read_from_disk = 0
        self._about = about
        self._values: dict[Runs, list[list[float]]] = {}
        self._file: int | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            good = self._read(path)
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NONBLOCK", 0)
            self._file = os.open(path, flags, 0o644)
            if good:
                os.write(self._file, good)
        except OSError as error:
            raise self._unwritable(error) from error
        self.read_from_disk = len(self._values)

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)

    def cached(self, runs: Runs) -> list[list[float]]:
        """Values of a trial so far, a list per part; empty when it was never run."""
        return self._values.get(runs, [])

    def store(self, runs: Runs, values: list[float]) -> None:
        """Add the values of a trial's next part, and write them to disk at once.

        Raises:
            OutputError: The disk is full.
        """
        parts = self._values.setdefault(runs, [])
        if self._file is not None:
            line = self._line(runs, len(parts), values)
            try:
                # A single write, so that lines of several processes do not mix and an
                # interruption truncates at most the last line.
                if os.write(self._file, line) != len(line):
                    os.write(self._file, b"\n")
                    raise OSError(0, "the disk is full")
            except OSError as error:
                raise self._unwritable(error) from error
        parts.append(values)

    def _line(self, runs: Runs, part: int, values: list[float]) -> bytes:
        entry: dict[str, Any] = {"runs": runs, "part": part, "values": values}
        return (json.dumps({**entry, "sum": self._sum(entry)}) + "\n").encode()

    def _sum(self, entry: dict[str, Any]) -> str:
        return checksum(self._about, entry["runs"], entry["part"], entry["values"])[:16]

    def _read(self, path: Path) -> bytes:
        """Read a journal; returns its valid lines if it was damaged and set aside."""
        content = _content(path)
        lines = [line for line in re.split(rb"(?<=\n)", content or b"") if line]
        good = [line for line in lines if line.endswith(b"\n") and self._add(line)]
        damaged = len(lines) - len(good)
        if not damaged and content is not None:
            return b""
        aside = set_aside(path)
        if aside is not None:
            what = f"{damaged} of {len(lines)} lines" if lines else "it is not a readable file"
            say(
                f"  the journal {path} is damaged ({what}) and was set aside as {aside.name}; "
                "missing values are measured again"
            )
        return b"".join(good)

    def _add(self, line: bytes) -> bool:
        """Add the values of a line; False where it is damaged or foreign."""
        entry = self._entry(line)
        if entry is None:
            return False
        runs, part, values = entry
        parts = self._values.get(runs, [])
        # Two searches at once may have measured the same part, with the same values.
        if part == len(parts):
            self._values[runs] = [*parts, values]
        return True

    def _entry(self, line: bytes) -> tuple[Runs, int, list[float]] | None:
        """The entry of a line; None where it is damaged or foreign."""
        try:
            entry = json.loads(line)
            if entry["sum"] != self._sum(entry):
                return None
            runs = tuple(Run(*run) for run in entry["runs"])
            values = [float(value) for value in entry["values"]]
            part = int(entry["part"])
            hash(runs)
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            return None
        return (runs, part, values) if all(map(math.isfinite, values)) else None

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot write the journal of trials {self.path}: {error.strerror or error}",
            hint="free some space there or set SLM_PLUGIN_CACHE to another folder",
        )


def _content(path: Path) -> bytes | None:
    """The bytes of a journal; None where its path is not a regular file."""
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
