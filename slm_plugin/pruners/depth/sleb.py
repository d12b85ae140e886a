"""SLEB: drop the layer that the model misses least, measure anew, and again.

Source: SLEB (arXiv 2402.09025), with its third metric: the loss of the model as it then is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from slm_plugin.counts import Natural
from slm_plugin.plans import PruningPlan, Trial
from slm_plugin.pruners.depth.decision import depth_plan
from slm_plugin.pruners.depth.dropping import BetweenEnds, EndsOptions, one_by_one
from slm_plugin.pruners.depth.measures.criteria import CRITERIA, CriterionName
from slm_plugin.pruners.depth.search.runs import DROP, Found, Measure, Measured, Runs
from slm_plugin.pruners.depth.search.trials import trials_of
from slm_plugin.registry import register_pruner

if TYPE_CHECKING:
    from slm_plugin.session import Session


class SlebOptions(EndsOptions):
    """What a layer is judged by, and the published barriers at both ends."""

    criterion: Annotated[
        CriterionName,
        Field(description="how alike the shortened model is to the original; published: loss"),
    ] = "loss"
    protect_first: Annotated[
        Natural, Field(description="lowest layers that stay (early barrier)")
    ] = 1
    protect_last: Annotated[
        Natural, Field(description="highest layers that stay (latter barrier)")
    ] = 1


@register_pruner("sleb")
class Sleb(BetweenEnds):
    """Drop one layer at a time: always the one without which the calibration loss is lowest."""

    streams: ClassVar = True
    keeps_trials: ClassVar = True
    Options: ClassVar = SlebOptions
    options: SlebOptions

    def plan(self, session: Session) -> PruningPlan:
        """Search, and write down which layers go, in the order of their going.

        Raises:
            TargetError: The target cannot be reached.
            NumericalError: The model or a trial gives NaN.
        """
        wanted = self.wanted(session)
        eligible = self.eligible(len(session.view.layers))
        with trials_of(session, self.name, self.options.criterion, DROP) as trials:
            found = dropped_in_turn(eligible, wanted, trials)
        meaning = CRITERIA[self.options.criterion].meaning
        return depth_plan(
            self,
            session,
            one_by_one([run.first for run in found.runs]),
            [f"similarity: {meaning}, mean over the calibration samples", *found.notes],
            trials=found.trials,
            explored=tuple(trials.others(found)),
        )


def dropped_in_turn(eligible: Sequence[int], wanted: int, measure: Measure) -> Found:
    """Drop ``wanted`` layers, each the one that the model as it then is misses least.

    Args:
        eligible: Layers that may go, in ascending order.
        wanted: Layers to drop, no more than are eligible.
        measure: Compares the model with a layer dropped, on top of others, with the original one.
    """
    runs: Runs = ()
    trials: list[Trial] = []
    for _ in range(wanted):
        gone = {run.first for run in runs}
        best: Measured | None = None
        # The higher a layer, the less there is to run: a good bar is cheaply found from the top.
        for index in reversed([index for index in eligible if index not in gone]):
            bar = None if best is None else best.value
            tried = measure(index, index, runs, base=runs, hopeless_at=bar)
            # Of equal layers the lowest goes.
            if tried.samples is None and (best is None or tried.value >= best.value):
                best = tried
        if best is None:
            raise ValueError(f"{wanted} layers are wanted and {len(eligible)} may go")
        trials.append(best.trial(runs, accepted=True))
        runs = (*runs, best.run)
    note = "at every step each layer that is left was tried, and the one missed least went"
    return Found(runs, tuple(trials), notes=(note,))
