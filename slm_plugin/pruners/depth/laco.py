"""LaCo: merge groups of a fixed size, top first, while the final hidden state stays similar.

Source: LaCo (arXiv 2402.11187), algorithm 1. The paper's formula for one group, "reserving
differences while seeking common", is the rule ``rdsc``; the released notebooks compute
``telescoped``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from slm_plugin.component import Options
from slm_plugin.counts import MOST, Count, Natural
from slm_plugin.errors import TargetError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.plans import PruningPlan, Trial
from slm_plugin.plans.rules import factors
from slm_plugin.pruners import base
from slm_plugin.pruners.depth.depth_plan import kinds_of, unlike
from slm_plugin.pruners.depth.measures.criteria import CriterionName, refuse_threshold
from slm_plugin.pruners.depth.search.found_plan import found_plan
from slm_plugin.pruners.depth.search.runs import Found, Measure, Measured, Run, Runs, alike, removed
from slm_plugin.pruners.depth.search.sliding import highest_threshold
from slm_plugin.pruners.depth.search.trials import Trials, trials_of
from slm_plugin.registry import register_pruner

if TYPE_CHECKING:
    from slm_plugin.session import Session

Rule = Literal["telescoped", "rdsc"]


class LacoOptions(Options):
    """The published parameters under descriptive names: C, I, L, H and the merge rule."""

    criterion: Annotated[
        CriterionName,
        Field(description="similarity of the merged model to the original; published: flat_cosine"),
    ] = "flat_cosine"
    layers_per_merge: Annotated[
        int, Field(ge=2, le=MOST, description="layers that one merge combines (C)")
    ] = 4
    interval: Annotated[Count, Field(description="layers between the starts of two merges (I)")] = 2
    lowest: Annotated[Natural, Field(description="lowest layer that may take part (L)")] = 1
    highest: Annotated[
        Count | None,
        Field(description="the first merge ends below this layer (H); default: the last"),
    ] = None
    merge_rule: Annotated[
        Rule, Field(description="telescoped: the released code; rdsc: the paper's formula")
    ] = "telescoped"

    former: ClassVar = {
        "clamp": "a window that extends above the last layer moves down to end at it"
    }


@dataclass(frozen=True, slots=True)
class CollapseRules:
    """Rules of the walk.

    Attributes:
        layers: Decoder layers of the model.
        size: Layers of a full window.
        interval: Layers between a merge and the next window.
        lowest: Lowest layer of any window.
        highest: The first window ends below this layer.
        rule: The merge rule.
        kinds: What makes each layer differ from others; layers of different kinds are never merged.
    """

    layers: int
    size: int
    interval: int
    lowest: int
    highest: int
    rule: Rule
    kinds: tuple[object, ...] = ()

    @property
    def most(self) -> int:
        """Layers removed when every trial is accepted."""

        def accept(first: int, last: int, rest: Runs, **asked: object) -> Measured:
            return Measured(Run(first, last, self.rule), 0.0)

        return collapse(self, -math.inf, accept).removed

    def next_window(self, low: int, left: int) -> int:
        """Lowest layer of the window after a merge at ``low``, with ``left`` layers remaining."""
        return min(low - self.interval, left - self.size)


def collapse(
    rules: CollapseRules, threshold: float, measure: Measure, wanted: int | None = None
) -> Found:
    """Walk down the decoder and merge every window that leaves the model similar to the original.

    A later window may include a merged layer.

    Args:
        rules: Rules of the walk.
        threshold: A merge is accepted when its value is greater.
        measure: Compares the merged model with the original one.
        wanted: Stop when this many layers are removed; the last windows are shortened to match.
    """
    trials: list[Trial] = []
    runs: Runs = ()
    # The present layers, each as the run of original layers that it replaces.
    layers = [Run(index, index, rules.rule) for index in range(rules.layers)]
    # A search for a size needs exact values to find the interval of thresholds of each walk, so it
    # has no early stopping.
    bound = threshold if wanted is None else None
    low = rules.highest - rules.size
    while low >= rules.lowest and removed(runs) != wanted:
        size = rules.size if wanted is None else min(rules.size, wanted - removed(runs) + 1)
        window = layers[low : low + size]
        first, last = window[0].first, window[-1].last
        if not alike(rules.kinds, first, last):
            low -= 1
            continue
        rest = tuple(run for run in runs if run not in window)
        tried = measure(first, last, rest, rule=absorbing(rules.rule, window), bound=bound)
        good = tried.value > threshold
        trials.append(tried.trial(rest, accepted=good))
        if not good:
            low -= 1
            continue
        if len(window) > 1:
            layers[low : low + size] = [tried.run]
            runs = (*rest, tried.run)
        low = rules.next_window(low, len(layers))
    return Found(runs, tuple(trials), threshold)


def absorbing(rule: Rule, window: Sequence[Run]) -> str:
    """The merge rule of a window, expressed in the original layers.

    Telescoping ends at the top layer of a telescoped layer. RDSC is a sum, so RDSC of sums is again
    a weighted sum: of n layers, all are added and the lowest is subtracted n - 1 times.

    Args:
        rule: The merge rule.
        window: The run behind each layer of the window, lowest first.
    """
    if rule == "telescoped" or len(window) == 1:
        return window[0].rule
    if all(run.first == run.last for run in window):
        return rule
    parts = [factors(run.rule, run.last - run.first + 1)[0] for run in window]
    lowest = [(2 - len(window)) * part for part in parts[0]]
    whole = [*lowest, *(part for absorbed in parts[1:] for part in absorbed)]
    return f"weighted({','.join(f'{part + 0:.0f}' for part in whole)})"


@register_pruner("laco")
class LayerCollapse(base.Pruner):
    """Merge groups of layers, top first, while the final hidden state stays similar."""

    kind: ClassVar = "depth"
    targets: ClassVar = ("threshold", "layers_removed", "ratio", "parameters")
    streams: ClassVar = True
    merges: ClassVar = True
    keeps_trials = True
    Options: ClassVar = LacoOptions
    options: LacoOptions

    def check(self) -> None:
        """Check the range of the threshold."""
        refuse_threshold(self.target.threshold, self.options.criterion)

    def check_target(self, original: Dimensions, current: Dimensions) -> None:
        """Check that the range has room for a window and that the walk can reach the target."""
        self._check_target(original, current, self._rules(current))

    def _check_target(
        self, original: Dimensions, current: Dimensions, rules: CollapseRules
    ) -> None:
        super().check_target(original, current)
        span = f"layers_per_merge {rules.size}, lowest {rules.lowest} and highest {rules.highest}"
        if rules.highest > rules.layers:
            raise TargetError(
                f"highest is {rules.highest}; the model has {rules.layers} layers",
                hint=f"give at most {rules.layers}",
            )
        if rules.highest - rules.size < rules.lowest:
            raise TargetError(
                f"with {span} no window fits into the model's {rules.layers} layers",
                hint="merge fewer layers at once or widen the range",
            )
        if self.target.kind != "threshold":
            wanted = base.layers_to_remove(self.target, original, current)
            base.refuse_beyond(
                self.target,
                wanted,
                rules.most,
                rules.layers,
                f"{span}, interval {rules.interval}{unlike(rules.kinds)}",
            )

    def plan(self, session: Session) -> PruningPlan:
        """Search for the windows to merge.

        Raises:
            TargetError: The target cannot be reached.
            NumericalError: The model or a trial gives NaN.
        """
        before = session.view.dimensions()
        rules = self._rules(before, kinds_of(session.view))
        self._check_target(session.original, before, rules)
        options = self.options
        with trials_of(session, self.name, options.criterion, options.merge_rule) as trials:
            found = self._search(session, before, rules, trials)
        return found_plan(self, session, options.criterion, trials, found)

    def _rules(self, model: Dimensions, kinds: tuple[object, ...] = ()) -> CollapseRules:
        options = self.options
        return CollapseRules(
            layers=model.layers,
            size=options.layers_per_merge,
            interval=options.interval,
            lowest=max(options.lowest, model.fixed_layers),
            highest=model.layers - 1 if options.highest is None else options.highest,
            rule=options.merge_rule,
            kinds=kinds,
        )

    def _search(
        self, session: Session, before: Dimensions, rules: CollapseRules, trials: Trials
    ) -> Found:
        if self.target.threshold is not None:
            return collapse(rules, self.target.threshold, trials)
        wanted = base.layers_to_remove(self.target, session.original, before)
        return highest_threshold(
            lambda threshold: collapse(rules, threshold, trials, wanted), wanted, trials.greatest
        )
