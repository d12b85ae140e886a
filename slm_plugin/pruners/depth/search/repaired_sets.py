"""Trials of sets of dropped layers, every gap repaired anew.

The value of a set does not depend on how it was reached: it is that of the model which surgery and
the recovery of the boundaries make.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from statistics import fmean
from typing import TYPE_CHECKING

from slm_plugin.progress import counting
from slm_plugin.pruners.depth.measures.criteria import CriterionName
from slm_plugin.pruners.depth.search.exchanges import Dropped, Tried
from slm_plugin.pruners.depth.search.journal import Journal, is_part
from slm_plugin.pruners.depth.search.race import race
from slm_plugin.pruners.depth.search.repaired_stack import RepairedStack
from slm_plugin.pruners.depth.search.repaired_values import RepairedValues
from slm_plugin.pruners.depth.search.runs import DROP, Run
from slm_plugin.pruners.trial_store import repair_target, tell_read, trial_store

if TYPE_CHECKING:
    from slm_plugin.session import Session


@contextmanager
def repaired_sets(
    session: Session, repair: str, criterion: CriterionName, *, whole: bool
) -> Iterator[RepairedSets]:
    """Trials with a progress counter, stored in the session's journal.

    Args:
        session: Holds the model and its calibration set.
        repair: Name of one of `repaired_stack.REPAIRS`, or none.
        criterion: Judges the sets.
        whole: Judge every set on all samples that count; see `race`.

    Raises:
        OutputError: The journal cannot be written.
    """
    what = f"{criterion} after all gaps by {repair}{repair_target(session)}"
    journal = Journal(trial_store(session, what, "sets of runs, unfitted samples", is_part))
    tell_read(session, journal.read_from_disk, journal.store)
    with counting("repaired: exchanges") as count:
        values = RepairedValues(session, repair, criterion, journal, count)
        yield RepairedSets(RepairedStack(session, repair), values, whole=whole)


class RepairedSets:
    """Judges sets of dropped layers; the layers below the lowest difference run once.

    Args:
        stack: All layers of the model.
        values: The criterion's values of trials.
        whole: Judge every set on all samples that count; see `race`.
    """

    def __init__(self, stack: RepairedStack, values: RepairedValues, *, whole: bool) -> None:
        self._values, self._whole = values, whole
        # Sets with their stacks: the latest best one that was run, and the latest of all.
        self._base: tuple[Dropped, RepairedStack] = (), stack
        self._latest: tuple[Dropped, RepairedStack] = self._base

    def __call__(self, dropped: Dropped, best: Tried | None) -> Tried:
        """Judge a set; see `exchanges.Judge`.

        Raises:
            CalibrationError: A repair is fitted on fewer than 2 samples.
            NumericalError: Activations or a value are NaN.
        """
        if best is not None and best.dropped == self._latest[0]:
            self._base = self._latest
        sets = [dropped] if best is None else [best.dropped, dropped]
        seen = race(
            len(sets),
            self._values.parts,
            lambda number, part: self._part(sets[number], part),
            whole=self._whole,
        )
        complete = len(seen[-1]) == max(map(len, seen))
        layer = min({*dropped}.difference(best.dropped if best else ()))
        return Tried(dropped, layer, fmean(seen[-1]), None if complete else len(seen[-1]))

    def _part(self, dropped: Dropped, part: int) -> list[float]:
        runs = tuple(Run(index, index, DROP) for index in dropped)
        return self._values(runs, part, lambda asked: self._stack(dropped).outputs(asked))

    def _stack(self, dropped: Dropped) -> RepairedStack:
        if dropped != self._latest[0]:
            self._latest = dropped, self._base[1].without(dropped)
        return self._latest[1]
