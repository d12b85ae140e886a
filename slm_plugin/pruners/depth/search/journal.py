"""A journal of trials: what a search has measured outlives the process that measured it.

Values are kept per sample in the order of measuring, so that a search that was killed goes on where
it stopped and ends with the same plan, and searches with other targets share the trials.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import torch

import slm_plugin
from slm_plugin.calibration.samples import digest
from slm_plugin.errors import OutputError
from slm_plugin.pruners.depth.search.runs import Run, Runs

if TYPE_CHECKING:
    from slm_plugin.session import Session


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
    name = hashlib.sha256("\n".join(map(str, facts)).encode()).hexdigest()[:24]
    return Journal(session.journals / f"{name}.jsonl")


class Journal:
    """Values of trials by the runs that were merged: a list for every part of the samples.

    Attributes:
        path: The file; None where the values are kept in memory only.
        read_from_disk: Trials that the file held.

    Args:
        path: JSON lines, one a measured part; None keeps the values in memory only. The name must
            stand for everything that a value depends on beside the runs.

    Raises:
        OutputError: The file cannot be written.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.read_from_disk = 0
        self._known: dict[Runs, list[list[float]]] = {}
        self._file: TextIO | None = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+", encoding="utf-8")
            self._read(self._file)
        except OSError as error:
            raise self._unwritable(error) from error
        self.read_from_disk = len(self._known)

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
            line = json.dumps({"runs": runs, "part": len(parts), "values": values})
            try:
                # A process that is killed here leaves at most a last line that is cut short.
                self._file.write(line + "\n")
                self._file.flush()
            except OSError as error:
                raise self._unwritable(error) from error
        parts.append(values)

    def _read(self, file: TextIO) -> None:
        file.seek(0)
        end = 0
        for line in iter(file.readline, ""):
            try:
                entry = json.loads(line)
                runs = tuple(Run(*run) for run in entry["runs"])
                part, values = entry["part"], entry["values"]
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith("\n"):
                break
            parts = self._known.setdefault(runs, [])
            if part == len(parts):
                parts.append([float(value) for value in values])
            end = file.tell()
        # Nothing may be appended to half a line.
        file.truncate(end)

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(
            f"cannot keep the journal of trials {self.path}: {error.strerror}",
            hint="free some space there or set SLM_PLUGIN_CACHE to another folder",
        )
