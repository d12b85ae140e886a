"""Values of trials of repaired models, from the journal or from a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from slm_plugin.pruners.depth.measures.criteria import CriterionName
from slm_plugin.pruners.depth.measures.similarity import Similarity
from slm_plugin.pruners.depth.search.journal import Journal
from slm_plugin.pruners.depth.search.judged_samples import Part, judged_parts
from slm_plugin.pruners.depth.search.repaired_stack import FITS
from slm_plugin.pruners.depth.search.runs import Runs

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session


class RepairedValues:
    """The criterion's values of trials, part by part.

    Attributes:
        parts: Number of parts of the samples.

    Args:
        session: Holds the model and its calibration set.
        repair: Name of one of `repaired_stack.REPAIRS`, or none.
        criterion: Judges the trials.
        journal: Where the values are stored.
        count: Called for every trial that is run.
    """

    def __init__(
        self,
        session: Session,
        repair: str,
        criterion: CriterionName,
        journal: Journal,
        count: Callable[[], None],
    ) -> None:
        self._parts = judged_parts(session, fitted=repair in FITS)
        self._similarity = Similarity(session.view, [part.batch for part in self._parts], criterion)
        self._journal, self._count = journal, count
        self.parts = len(self._parts)

    def __call__(self, runs: Runs, number: int, final: Callable[[Part], Tensor]) -> list[float]:
        """The values of the samples of a part.

        Args:
            runs: What the journal names the trial by.
            number: The part.
            final: Gives the trial's hidden states behind the final norm,
                ``(samples, length, hidden)``.

        Raises:
            NumericalError: A value is NaN.
        """
        known = self._journal.cached(runs)
        if number < len(known):
            return known[number]
        if number == 0:
            self._count()
        values = self.unstored(number, final)
        self._journal.add(runs, values)
        return values

    def unstored(self, number: int, final: Callable[[Part], Tensor]) -> list[float]:
        """The values of the samples of a part for a model that is no trial; see `__call__`."""
        return self._similarity.values(number, final(self._parts[number]))
