"""Values of trials of repaired models, from the journal or from a run.

Trials are judged on the samples that no repair is fitted to. On the others, trials whose repairs
fit too closely would win.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slm_plugin.calibration.captures import Batch, first_inputs
from slm_plugin.calibration.held_out import held_out_rows
from slm_plugin.pruners.depth.measures.criteria import CriterionName
from slm_plugin.pruners.depth.measures.similarity import Similarity
from slm_plugin.pruners.depth.search.journal import Journal
from slm_plugin.pruners.depth.search.repaired_stack import REPAIRS
from slm_plugin.pruners.depth.search.runs import Runs

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session


@dataclass(frozen=True, slots=True)
class Part:
    """The samples of a captured batch on which trials are judged.

    Attributes:
        number: The batch.
        rows: Their places in it.
        batch: They alone; without inputs of layers where they are not the whole batch.
    """

    number: int
    rows: Sequence[int] | slice
    batch: Batch


def judged_parts(session: Session, repair: str) -> list[Part]:
    """The samples that no repair is fitted to: those held out, or without a repair all."""
    captured = session.captured()
    if repair not in REPAIRS:
        return [Part(number, slice(None), batch) for number, batch in enumerate(captured)]
    held = held_out_rows(batch.tokens for batch in captured)
    found = {number: rows for number, (_, rows) in enumerate(held) if rows}
    entered = first_inputs(
        session.view, (captured[number].tokens[rows] for number, rows in found.items())
    )
    return [
        Part(number, rows, replace(batch, final=captured[number].final[rows]))
        for (number, rows), batch in zip(found.items(), entered, strict=True)
    ]


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
        self._parts = judged_parts(session, repair)
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
        values = self._similarity.values(number, final(self._parts[number]))
        self._journal.add(runs, values)
        return values
