"""SLEB: repeatedly drop the layer whose removal increases the loss least.

Source: SLEB (arXiv 2402.09025), with its third metric, the loss of the shortened model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from slm_plugin.counts import Natural
from slm_plugin.plans import PruningPlan, Trial
from slm_plugin.pruners.depth.dropping import BetweenEnds, EndsOptions
from slm_plugin.pruners.depth.measures.criteria import CriterionName
from slm_plugin.pruners.depth.search.found_plan import found_plan
from slm_plugin.pruners.depth.search.runs import DROP, Found, Measure, Measured, Runs
from slm_plugin.pruners.depth.search.trials import trials_of
from slm_plugin.registry import register_pruner

if TYPE_CHECKING:
    from slm_plugin.session import Session


class SlebOptions(EndsOptions):
    """The search criterion, and the published barriers at both ends."""

    criterion: Annotated[
        CriterionName,
        Field(description="similarity of the shortened model to the original; published: loss"),
    ] = "loss"
    protect_first: Annotated[
        Natural, Field(description="lowest layers to protect (early barrier)")
    ] = 1
    protect_last: Annotated[
        Natural, Field(description="highest layers to protect (latter barrier)")
    ] = 1


@register_pruner("sleb")
class Sleb(BetweenEnds):
    """Drop one layer at a time: the one whose removal gives the lowest calibration loss."""

    unlisted: ClassVar[bool] = True
    streams: ClassVar = True
    keeps_trials = True
    Options: ClassVar = SlebOptions
    options: SlebOptions

    def plan(self, session: Session) -> PruningPlan:
        """Search for the layers to remove.

        Raises:
            TargetError: The target cannot be reached.
            NumericalError: The model or a trial gives NaN.
        """
        wanted = self.wanted(session)
        eligible = self.removable(session.view)
        with trials_of(session, self.name, self.options.criterion, DROP) as trials:
            found = dropped_in_turn(eligible, wanted, trials)
        return found_plan(self, session, self.options.criterion, trials, found)


def dropped_in_turn(eligible: Sequence[int], wanted: int, measure: Measure) -> Found:
    """Drop ``wanted`` layers greedily.

    Args:
        eligible: Layers that may be removed, in ascending order.
        wanted: Number of layers to drop, at most the number of eligible ones.
        measure: Compares the shortened model with the original one.
    """
    runs: Runs = ()
    trials: list[Trial] = []
    for _ in range(wanted):
        dropped = {run.first for run in runs}
        best: Measured | None = None
        # Trials of high layers are cheap, so going down from the top finds a good bound early.
        for index in reversed([index for index in eligible if index not in dropped]):
            bound = None if best is None else best.value
            tried = measure(index, index, runs, base=runs, bound=bound)
            # Ties drop the lowest layer.
            if tried.samples is None and (best is None or tried.value >= best.value):
                best = tried
        if best is None:
            raise ValueError(f"cannot drop {wanted} of {len(eligible)} eligible layers")
        trials.append(best.trial(runs, accepted=True))
        runs = (*runs, best.run)
    note = "greedy search: each step removed the layer of least loss increase"
    return Found(runs, tuple(trials), notes=(note,))
