"""BlockPruner, held to what stock classes load: drop a neighbouring attention and MLP, and again.

Source: BlockPruner (arXiv 2406.10594), greedy search by the calibration loss. It drops single
blocks, which leaves layers that no stock model class has. Of a decoder seen as attention 0, MLP 0,
attention 1, MLP 1, … here two neighbours go at a time: an attention with its MLP is a layer, and an
MLP with the next attention leaves one layer where two were. Either way what is left alternates.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

from pydantic import Field

from slm_plugin.plans import DropSublayers, PruningPlan, Trial
from slm_plugin.pruners.depth.decision import depth_plan
from slm_plugin.pruners.depth.dropping import BetweenEnds, EndsOptions
from slm_plugin.pruners.depth.measures.criteria import CRITERIA, CriterionName
from slm_plugin.pruners.depth.search.runs import DROP, JOIN, Found, Measure, Measured, Runs
from slm_plugin.pruners.depth.search.trials import trials_of
from slm_plugin.registry import register_pruner

if TYPE_CHECKING:
    from slm_plugin.session import Session

# Layers by whose attention and whose MLP they have.
Pairs = tuple[tuple[int, int], ...]


class SublayerOptions(EndsOptions):
    """What two blocks are judged by, and layers at both ends that stay whole."""

    criterion: Annotated[
        CriterionName,
        Field(description="how alike the shortened model is to the original; published: loss"),
    ] = "loss"


@register_pruner("sublayer")
class Sublayer(BetweenEnds):
    """Drop two neighbouring blocks at a time: those without which the loss is lowest."""

    streams: ClassVar = True
    keeps_trials: ClassVar = True
    Options: ClassVar = SublayerOptions
    options: SublayerOptions

    def plan(self, session: Session) -> PruningPlan:
        """Search, and write down which blocks go, in the order of their going.

        Raises:
            TargetError: The target cannot be reached.
            NumericalError: The model or a trial gives NaN.
        """
        wanted = self.wanted(session)
        layers = len(session.view.layers)
        with trials_of(session, self.name, self.options.criterion, DROP) as trials:
            found, operations = dropped_in_pairs(layers, self.eligible(layers), wanted, trials)
        meaning = CRITERIA[self.options.criterion].meaning
        return depth_plan(
            self,
            session,
            operations,
            [f"similarity: {meaning}, mean over the calibration samples", *found.notes],
            trials=found.trials,
            explored=tuple(trials.others(found)),
        )


class Step(NamedTuple):
    """Two blocks that may go.

    Attributes:
        gone: The blocks.
        first: Lowest original layer of what changes.
        last: Highest original layer of what changes.
        rule: `runs.DROP` where a layer goes, `runs.JOIN` where two become one.
        left: The layers behind it.
    """

    gone: DropSublayers
    first: int
    last: int
    rule: str
    left: Pairs


def steps(pairs: Pairs, eligible: Collection[int]) -> Iterator[Step]:
    """All neighbouring blocks that may go, lowest first.

    Args:
        pairs: The layers as they then are.
        eligible: Original layers whose blocks may go.
    """
    for at, (attention, mlp) in enumerate(pairs):
        if mlp not in eligible:
            continue
        below, above = pairs[:at], pairs[at + 1 :]
        if attention in eligible:
            gone = DropSublayers(attention=(attention,), mlp=(mlp,))
            yield Step(gone, attention, mlp, DROP, below + above)
        if above and above[0][0] in eligible:
            upper, last = above[0]
            gone = DropSublayers(attention=(upper,), mlp=(mlp,))
            yield Step(gone, attention, last, JOIN, (*below, (attention, last), *above[1:]))


def dropped_in_pairs(
    layers: int, eligible: Sequence[int], wanted: int, measure: Measure
) -> tuple[Found, list[DropSublayers]]:
    """Drop two neighbouring blocks ``wanted`` times, each time those missed least.

    Args:
        layers: Layers of the model.
        eligible: Layers whose blocks may go.
        wanted: Layers to lose, no more than are eligible and fewer than there are.
        measure: Compares the model with layers dropped or joined, on top of others, with the
            original one.
    """
    runs: Runs = ()
    pairs: Pairs = tuple((index, index) for index in range(layers))
    trials: list[Trial] = []
    operations: list[DropSublayers] = []
    for _ in range(wanted):
        best: tuple[Measured, Step, Runs] | None = None
        # The higher a block, the less there is to run: a good bar is cheaply found from the top.
        for step in reversed(list(steps(pairs, eligible))):
            # What went between two layers that are joined is part of their joint.
            rest = tuple(run for run in runs if not step.first <= run.first <= step.last)
            bar = None if best is None else best[0].value
            tried = measure(step.first, step.last, rest, base=runs, hopeless_at=bar, rule=step.rule)
            # Of equal steps the lowest is made.
            if tried.samples is None and (best is None or tried.value >= best[0].value):
                best = tried, step, rest
        if best is None:
            raise ValueError(f"{wanted} layers are wanted and {len(eligible)} may go")
        tried, step, rest = best
        trials.append(tried.trial(rest, accepted=True))
        operations.append(step.gone)
        runs, pairs = (*rest, tried.run), step.left
    note = "at every step each two neighbouring blocks were tried, and those missed least went"
    return Found(runs, tuple(trials), notes=(note,)), operations
