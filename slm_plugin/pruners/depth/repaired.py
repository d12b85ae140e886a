"""Drop or merge the layers without which the model is best once the gaps are repaired.

Source: the repair inside the search is SPRINT's (arXiv 2506.03510), here for whole layers, with the
dense model's states as target. The greedy search by the loss is SLEB's (arXiv 2402.09025), merges
and their rules are those of SLM (arXiv 2502.19159), joins those of `sublayer`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from typing import TYPE_CHECKING, Any, ClassVar

from slm_plugin.calibration.held_out import held_out_count
from slm_plugin.evaluation.prefill import Prompts
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.families.suitability import why_not
from slm_plugin.plans import PruningPlan
from slm_plugin.pruners.base import Pruner
from slm_plugin.pruners.depth.depth_plan import depth_plan, kinds_of
from slm_plugin.pruners.depth.dropping import BetweenEnds
from slm_plugin.pruners.depth.measures.criteria import CRITERIA, CriterionName
from slm_plugin.pruners.depth.measures.layer_costs import described, layer_costs
from slm_plugin.pruners.depth.polish import polished_plan, starting
from slm_plugin.pruners.depth.repaired_options import RepairedOptions
from slm_plugin.pruners.depth.search.repaired_sets import repaired_sets
from slm_plugin.pruners.depth.search.repaired_stack import FITS, Candidate
from slm_plugin.pruners.depth.search.repaired_trials import Judged, RepairedTrials, repaired_trials
from slm_plugin.pruners.depth.search.runs import DROP, JOIN, Run, alike
from slm_plugin.pruners.influence import block_influence
from slm_plugin.registry import register_pruner
from slm_plugin.restoration.rescaling import unscalable
from slm_plugin.surgery.merge_rules import candidates as rules_of

if TYPE_CHECKING:
    from slm_plugin.models.families.family import Family
    from slm_plugin.session import Session

JUDGES: dict[str, CriterionName] = {"loss": "loss", "kl": "logit_kl"}
STATE = "minus the relative error of the state behind the gap"
FOLLOWED_BY: dict[str, dict[str, Any] | None] = {
    "boundary": {"recover": "refit"},
    "fold_linear": {"recover": "fold_linear"},
    "rescale": {"recover": "rescale"},
    "none": None,
}


@register_pruner("repaired")
class Repaired(BetweenEnds):
    """Drop or merge one layer at a time: the one that the repaired model misses least.

    Each step estimates for every candidate what the state behind it lacks after the repair, and
    judges the best of them by the divergence of the whole model with that repair in place, on the
    samples that no repair is fitted to. The plan of fewer layers is the beginning of the plan of
    more, unless ``polish`` changed it. The repair is no part of the plan; the recovery that belongs
    to it runs behind.
    """

    keeps_trials = True
    Options: ClassVar = RepairedOptions
    options: RepairedOptions

    def unsuited_options(self, family: Family, config: Mapping[str, Any]) -> str:
        """The repair needs linear maps; a join needs separate steps."""
        if JOIN in self.options.merge_rules and family.is_parallel(config):
            return "its attention and its MLP read the same input, so `join` has no separate steps"
        if self._start is not None and (reason := why_not(self._start, family, config)):
            return f"its start '{self._start.name}': {reason}"
        room = family.canonical(config).get("max_position_embeddings")
        if self.options.per == "latency" and room is not None and self.options.positions > room:
            return (
                f"`prompt_tokens` and `new_tokens` are {self.options.positions:,} positions "
                f"together, and it has {room:,}"
            )
        if self.options.repair == "none":
            return ""
        if family.no_fit:
            return f"{family.no_fit}; set `repair: none`"
        if self.options.repair == "fold_linear" and family.norm_behind:
            return "a norm stands behind its MLP; set `repair: boundary`"
        if self.options.repair == "rescale" and (reason := unscalable(family)):
            return f"{reason}; set `repair: boundary`"
        return ""

    @property
    def followed_by(self) -> Mapping[str, Any] | None:
        """The recovery that makes the repairs of the search, and more."""
        return FOLLOWED_BY[self.options.repair]

    @cached_property
    def _start(self) -> Pruner | None:
        """The strategy whose plan is polished; None for the search.

        Raises:
            TargetError: It does not take the target.
        """
        start = self.options.start
        return None if start is None else starting(start, self.target)

    def check(self) -> None:
        """Check the start too."""
        if self._start is not None:
            self._start.check()

    def check_target(self, original: Dimensions, current: Dimensions) -> None:
        """Check that the protected layers leave enough to remove, here and for the start."""
        super().check_target(original, current)
        if self._start is not None:
            self._start.check_target(original, current)

    def plan(self, session: Session) -> PruningPlan:
        """Search for the layers to remove.

        Raises:
            TargetError: The target cannot be reached.
            CalibrationError: A repair is fitted on fewer than 2 samples.
            NumericalError: The model or a trial gives NaN.
            PlanError: The plan to start from does more than drop layers that may be dropped.
        """
        wanted = self.wanted(session)
        if self._start is not None:
            return self._polished(session, self._start.plan(session))
        found = self._searched(session, wanted)
        return self._polished(session, found) if self.options.polish else found

    def search(
        self, session: Session, wanted: int, costs: Sequence[float] = ()
    ) -> tuple[list[Judged], list[Judged]]:
        """The best candidate of every step, and all others that were judged.

        Args:
            session: Holds the model.
            wanted: Number of steps.
            costs: What each layer costs; empty where all cost the same.

        Raises:
            CalibrationError: A repair is fitted on fewer than 2 samples.
            NumericalError: The model or a trial gives NaN.
        """
        criterion = JUDGES.get(self.options.judge)
        with repaired_trials(session, self.options.repair, criterion, costs) as trials:
            chosen = self._chosen(session, wanted, trials)
            return chosen, [judged for judged in trials.made if judged not in chosen]

    def _searched(self, session: Session, wanted: int) -> PruningPlan:
        """The plan of the greedy search."""
        options = self.options
        costs = layer_costs(session, options.per, Prompts.of(options))
        chosen, others = self.search(session, wanted, costs)
        notes = [
            self._similarity(session),
            f"greedy search: each step removed the layer that the model with `repair: "
            f"{options.repair}` misses least{', for its cost' if costs else ''}",
        ]
        if options.per != "layer":
            notes.append(f"per {options.per}: {described(costs)}")
        return depth_plan(
            self,
            session,
            [judged.candidate.run.operation for judged in chosen],
            notes,
            trials=tuple(judged.trial(accepted=True) for judged in chosen),
            explored=tuple(judged.trial(accepted=False) for judged in others),
        )

    def _polished(self, session: Session, begun: PruningPlan) -> PruningPlan:
        """A finished plan after exchanges."""
        options, criterion = self.options, JUDGES[self.options.judge]
        whole = options.screen == "all"
        eligible = self.removable(session.view)
        with repaired_sets(session, options.repair, criterion, whole=whole) as judge:
            meaning = self._similarity(session)
            return polished_plan(self, session, begun, judge, eligible, options.polish, meaning)

    def _similarity(self, session: Session) -> str:
        """A note on what the similarities of trials are."""
        criterion = JUDGES.get(self.options.judge)
        meaning = f"{CRITERIA[criterion].meaning}, mean" if criterion else STATE
        return f"similarity: {meaning} over {self._samples(session)}"

    def _samples(self, session: Session) -> str:
        """The samples that candidates are judged on."""
        every = self.options.repair not in FITS
        count = session.samples if every else held_out_count(session.samples)
        said = "one calibration sample" if count == 1 else f"{count} calibration samples"
        return said if every else f"the {said} that no repair is fitted to"

    def _chosen(self, session: Session, wanted: int, trials: RepairedTrials) -> list[Judged]:
        """The best candidate of every step."""
        offer = self._offer(session)
        whole = self.options.screen == "all"
        chosen: list[Judged] = []
        while len(chosen) < wanted:
            if chosen:
                trials.commit(chosen[-1])
            given = list(candidates(trials.stack.spans, offer, wanted - len(chosen)))
            if self.options.screen != "all":
                given = sorted(given, key=trials.estimate, reverse=True)[: self.options.screen]
            chosen.append(trials.best(given, whole=whole))
        return chosen

    def _offer(self, session: Session) -> Offer:
        """What may be dropped and merged."""
        view, named = session.view, self.options.merge_rules

        @cache
        def influence() -> list[float]:
            return block_influence(view, session.captured())

        def rules(first: int) -> list[str]:
            found = (rules_of(r, first, first + 1, influence) for r in named if r != JOIN)
            return [*chain(*found), *([JOIN] if JOIN in named else [])]

        return Offer(frozenset(self.removable(view)), kinds_of(view), rules)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a search may drop and merge.

    Attributes:
        eligible: Layers that may go.
        kinds: What must be equal in layers that merge; empty where all are alike.
        rules: Rules by which a layer may merge with the one above.
    """

    eligible: Collection[int]
    kinds: tuple[object, ...]
    rules: Callable[[int], Sequence[str]]


def candidates(spans: Sequence[tuple[int, int]], offer: Offer, wanted: int) -> Iterator[Candidate]:
    """What one step may do, lowest first.

    Layers that merged take part in nothing more, so that every beginning of a plan is a plan. A
    merge uses two layers that could be dropped, and is left out where later steps need them.

    Args:
        spans: For every remaining layer, the lowest and the highest layer of the model in it.
        offer: What may be dropped and merged.
        wanted: Layers still to remove.
    """
    free = {
        position
        for position, (first, last) in enumerate(spans)
        if first == last and first in offer.eligible
    }
    for position in sorted(free):
        layer = spans[position][0]
        below = Candidate(Run(layer, layer, DROP), position - 1)
        yield below if position else Candidate(below.run, 0, replaced=1)
        adjacent = position + 1 in free and spans[position + 1][0] == layer + 1
        if not adjacent or len(free) - 2 < wanted - 1:
            continue
        for rule in offer.rules(layer):
            if rule == JOIN or alike(offer.kinds, layer, layer + 1):
                yield Candidate(Run(layer, layer + 1, rule), position)
