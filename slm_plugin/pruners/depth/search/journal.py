"""A journal of trials: the values that searches have measured, in a file of the cache folder.

Values are stored per sample in the order of measurement. An interrupted search therefore resumes
and ends with the same plan, and searches with other targets share the trials.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from slm_plugin.cache import Store
from slm_plugin.pruners.depth.search.runs import Run, Runs
from slm_plugin.pruners.trial_store import trial_store

if TYPE_CHECKING:
    from slm_plugin.session import Session


def journal_of(session: Session, criterion: str) -> Journal:
    """The journal of a model, a calibration set and a criterion.

    Raises:
        OutputError: The file cannot be written.
    """
    return Journal(trial_store(session, criterion, "keys and values", is_part))


class Journal:
    """Values of trials by their runs: a list for every part of the samples.

    Attributes:
        store: Where the values are, by runs and part.
        read_from_disk: Number of trials in the file.
    """

    def __init__(self, store: Store) -> None:
        self.store = store
        self._values: dict[Runs, list[list[float]]] = {}
        for (runs, part), values in sorted(store.items(), key=lambda item: item[0][1]):
            parts = self._values.setdefault(runs_of(runs), [])
            if part == len(parts):
                parts.append([float(value) for value in values])
        self.read_from_disk = sum(map(bool, self._values.values()))

    def cached(self, runs: Runs) -> list[list[float]]:
        """Values of a trial so far, a list per part; empty when it was never run."""
        return self._values.get(runs, [])

    def add(self, runs: Runs, values: list[float]) -> None:
        """Add the values of a trial's next part, and write them to disk at once.

        Raises:
            OutputError: The disk is full.
        """
        parts = self._values.setdefault(runs, [])
        self.store.store([runs, len(parts)], values)
        parts.append(values)


def is_part(key: Any, values: Any) -> bool:
    """Whether a line of a journal holds runs, the number of a part, and finite values."""
    runs, part = key
    hash(runs_of(runs))
    return isinstance(part, int) and all(math.isfinite(float(value)) for value in values)


def runs_of(data: Any) -> Runs:
    """Runs from plain data."""
    return tuple(Run(*run) for run in data)
