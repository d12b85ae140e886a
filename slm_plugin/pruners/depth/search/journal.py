"""A journal of trials: what a search has measured outlives the process that measured it.

Values are kept per sample in the order of measuring, so that a search that was killed goes on where
it stopped and ends with the same plan, and searches with other targets share the trials.

Each line carries a checksum over itself and over what the journal is about. A journal with lines
that were edited, cut short or copied from another one is told and set aside; its good lines are
copied to a new one, and what the others said is measured anew. Several processes may write one
journal: lines are appended whole, and none is ever taken away.
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
from slm_plugin.calibration.samples import digest
from slm_plugin.errors import OutputError
from slm_plugin.lazy import torch
from slm_plugin.progress import say
from slm_plugin.pruners.depth.search.runs import Run, Runs

if TYPE_CHECKING:
    from slm_plugin.session import Session

# Bytes of a journal that is read: a line has a few hundred.
LARGEST = 1 << 31


def journal_of(session: Session, criterion: str) -> Journal:
    """The journal of a model, a calibration set and a criterion.

    It lies in the session's journal folder under a name that stands for everything that a value
    depends on to its last digit, and in memory where the session has no such folder.

    Raises:
        OutputError: The file cannot be written.
    """
    if session.journals is None or session.calibration is None:
        return Journal()
    facts = (
        session.fingerprint().model_dump_json(),
        digest(session.calibration),
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
    """Values of trials by the runs that were merged: a list for every part of the samples.

    Attributes:
        path: The file; None where the values are kept in memory only.
        read_from_disk: Trials that the file held.

    Args:
        path: JSON lines, one a measured part; None keeps the values in memory only.
        about: Stands for everything that a value depends on beside the runs. Lines that were
            written about something else are not taken.

    Raises:
        OutputError: The file cannot be read or written.
    """

    def __init__(self, path: Path | None = None, about: str = "") -> None:
        self.path = path
        self.read_from_disk = 0
        self._about = about
        self._known: dict[Runs, list[list[float]]] = {}
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
        self.read_from_disk = len(self._known)

    def __del__(self) -> None:
        if self._file is not None:
            os.close(self._file)

    def known(self, runs: Runs) -> list[list[float]]:
        """Values of a trial so far, a list a part; empty when it was never made."""
        return self._known.get(runs, [])

    def keep(self, runs: Runs, values: list[float]) -> None:
        """Add the values of a trial's next part, on disk before anything else happens.

        Raises:
            OutputError: The disk is full.
        """
        parts = self._known.setdefault(runs, [])
        if self._file is not None:
            line = self._line(runs, len(parts), values)
            try:
                # One write: a line of another process stands before it or behind it, and a
                # process that is killed here leaves at most a last line that is cut short.
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
        """Take what a journal says; its good lines where it was set aside for others."""
        content = _content(path)
        lines = [line for line in re.split(rb"(?<=\n)", content or b"") if line]
        good = [line for line in lines if line.endswith(b"\n") and self._take(line)]
        damaged = len(lines) - len(good)
        if not damaged and content is not None:
            return b""
        aside = set_aside(path)
        if aside is not None:
            what = f"{damaged} of {len(lines)} lines" if lines else "it is no file that can be read"
            say(
                f"  the journal {path} is damaged ({what}) and was set aside as {aside.name}; "
                "what is missing is measured anew"
            )
        return b"".join(good)

    def _take(self, line: bytes) -> bool:
        """Take over what a line says; whether it is whole and about this."""
        entry = self._entry(line)
        if entry is None:
            return False
        runs, part, values = entry
        parts = self._known.get(runs, [])
        # Two searches at once may have measured one part; they measured the same.
        if part == len(parts):
            self._known[runs] = [*parts, values]
        return True

    def _entry(self, line: bytes) -> tuple[Runs, int, list[float]] | None:
        """What a line says; None where it is damaged, or about something else."""
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
            f"cannot keep the journal of trials {self.path}: {error.strerror or error}",
            hint="free some space there or set SLM_PLUGIN_CACHE to another folder",
        )


def _content(path: Path) -> bytes | None:
    """The bytes of a journal; None where something else has its name."""
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
