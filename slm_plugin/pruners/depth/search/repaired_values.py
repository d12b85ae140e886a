"""Values of trials of repaired models, from the journal or from a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from slm_plugin.lazy import torch
from slm_plugin.pruners.depth.measures.criteria import CriterionName
from slm_plugin.pruners.depth.measures.similarity import Similarity
from slm_plugin.pruners.depth.search.journal import Journal
from slm_plugin.pruners.depth.search.runs import Runs

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session


class RepairedValues:
    """The criterion's values of trials, part by part.

    Attributes:
        parts: Number of parts of the calibration set that count.

    Args:
        session: Holds the model and its calibration set.
        criterion: Judges the trials.
        journal: Where the values are stored.
        count: Called for every trial that is run.
        only: The batches that count, for a criterion that is not pooled; all where None.
    """

    def __init__(
        self,
        session: Session,
        criterion: CriterionName,
        journal: Journal,
        count: Callable[[], None],
        only: Sequence[int] | None = None,
    ) -> None:
        self._similarity = Similarity(session, criterion)
        self._batches = range(len(session.captured()))
        self._only = range(self._similarity.parts) if only is None else only
        self._journal, self._count = journal, count
        self.parts = len(self._only)

    def __call__(
        self, runs: Runs, part: int, final: Callable[[Sequence[int]], list[Tensor]]
    ) -> list[float]:
        """The values of the samples of a part.

        Args:
            runs: What the journal names the trial by.
            part: The part, by its place among those that count.
            final: Gives the trial's hidden states behind the final norm for some batches.

        Raises:
            NumericalError: A value is NaN.
        """
        known = self._journal.cached(runs)
        if part < len(known):
            return known[part]
        if part == 0:
            self._count()
        number = self._only[part]
        numbers = self._batches if self._similarity.pooled else [number]
        values = self._similarity.values(number, torch.cat(final(numbers)))
        self._journal.add(runs, values)
        return values
