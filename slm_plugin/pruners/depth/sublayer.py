"""BlockPruner, restricted to what stock classes load: drop adjacent attention and MLP blocks.

Source: BlockPruner (arXiv 2406.10594), greedy search by the calibration loss. It drops single
blocks, and stock model classes do not support the result. Here two adjacent blocks of the sequence
attention 0, MLP 0, attention 1, MLP 1, … are dropped at a time: an attention and its MLP are one
layer; an MLP and the next attention turn two layers into one. The remaining blocks alternate.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, NamedTuple

from pydantic import Field

from slm_plugin.plans import DropSublayers, PruningPlan, Trial
from slm_plugin.pruners.depth.dropping import BetweenEnds, EndsOptions
from slm_plugin.pruners.depth.measures.criteria import CriterionName
from slm_plugin.pruners.depth.search.found_plan import found_plan
from slm_plugin.pruners.depth.search.runs import DROP, JOIN, Found, Measure, Measured, Runs
from slm_plugin.pruners.depth.search.trials import trials_of
from slm_plugin.registry import register_pruner

if TYPE_CHECKING:
    from slm_plugin.models.families.family import Family
    from slm_plugin.session import Session

# Each remaining layer: the original layers of its attention and of its MLP.
Pairs = tuple[tuple[int, int], ...]


class SublayerOptions(EndsOptions):
    """The search criterion, and the protected layers at both ends."""

    criterion: Annotated[
        CriterionName,
        Field(description="similarity of the shortened model to the original; published: loss"),
    ] = "loss"


@register_pruner("sublayer")
class Sublayer(BetweenEnds):
    """Drop two adjacent blocks at a time: those whose removal gives the lowest loss."""

    streams: ClassVar = True
    keeps_trials = True
    Options: ClassVar = SublayerOptions
    options: SublayerOptions

    @classmethod
    def unsuited(cls, family: Family, config: Mapping[str, Any]) -> str:
        """Blocks that read the same input cannot be taken from two layers."""
        if family.is_parallel(config):
            return "its attention and its MLP read the same input, so they are no separate steps"
        return ""

    def plan(self, session: Session) -> PruningPlan:
        """Search for the blocks to remove.

        Raises:
            TargetError: The target cannot be reached.
            NumericalError: The model or a trial gives NaN.
        """
        wanted = self.wanted(session)
        layers = len(session.view.layers)
        with trials_of(session, self.name, self.options.criterion, DROP) as trials:
            found, operations = dropped_in_pairs(
                layers, self.removable(session.view), wanted, trials
            )
        return found_plan(self, session, self.options.criterion, trials, found, operations)


class Step(NamedTuple):
    """A candidate pair of blocks to drop.

    Attributes:
        dropped: The blocks.
        first: Lowest original layer affected.
        last: Highest original layer affected.
        rule: `runs.DROP` where a layer is dropped, `runs.JOIN` where two become one.
        left: The remaining layers.
    """

    dropped: DropSublayers
    first: int
    last: int
    rule: str
    left: Pairs


def steps(pairs: Pairs, eligible: Collection[int]) -> Iterator[Step]:
    """All adjacent blocks that may be dropped, lowest first.

    Args:
        pairs: The remaining layers.
        eligible: Original layers whose blocks may be dropped.
    """
    for at, (attention, mlp) in enumerate(pairs):
        if mlp not in eligible:
            continue
        below, above = pairs[:at], pairs[at + 1 :]
        if attention in eligible:
            dropped = DropSublayers(attention=(attention,), mlp=(mlp,))
            yield Step(dropped, attention, mlp, DROP, below + above)
        if above and above[0][0] in eligible:
            upper, last = above[0]
            dropped = DropSublayers(attention=(upper,), mlp=(mlp,))
            yield Step(dropped, attention, last, JOIN, (*below, (attention, last), *above[1:]))


def dropped_in_pairs(
    layers: int, eligible: Sequence[int], wanted: int, measure: Measure
) -> tuple[Found, list[DropSublayers]]:
    """Drop two adjacent blocks ``wanted`` times, greedily.

    Args:
        layers: Layers of the model.
        eligible: Layers whose blocks may be dropped.
        wanted: Number of layers to remove, at most the eligible ones and fewer than all.
        measure: Compares the shortened model with the original one.
    """
    runs: Runs = ()
    pairs: Pairs = tuple((index, index) for index in range(layers))
    trials: list[Trial] = []
    operations: list[DropSublayers] = []
    for _ in range(wanted):
        best: tuple[Measured, Step, Runs] | None = None
        # Trials of high blocks are cheap, so going down from the top finds a good bound early.
        for step in reversed(list(steps(pairs, eligible))):
            # Runs dropped between two joined layers are part of the join.
            rest = tuple(run for run in runs if not step.first <= run.first <= step.last)
            bound = None if best is None else best[0].value
            tried = measure(step.first, step.last, rest, base=runs, bound=bound, rule=step.rule)
            # Ties take the lowest step.
            if tried.samples is None and (best is None or tried.value >= best[0].value):
                best = tried, step, rest
        if best is None:
            raise ValueError(f"cannot remove {wanted} of {len(eligible)} eligible layers")
        tried, step, rest = best
        trials.append(tried.trial(rest, accepted=True))
        operations.append(step.dropped)
        runs, pairs = (*rest, tried.run), step.left
    note = "greedy search: each step removed the two adjacent blocks of least loss increase"
    return Found(runs, tuple(trials), notes=(note,)), operations
