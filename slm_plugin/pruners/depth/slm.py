"""Sliding Layer Merging: merge windows of layers while the final hidden state stays similar.

Source: SLM (arXiv 2502.19159), later "Sliding-Window Merging". The defaults are the published walk
with its bugs fixed. ``compatibility: released`` reproduces the released code trial for trial.
``search`` and ``criterion`` select other searches for the same operation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field, model_validator

from slm_plugin.component import Options
from slm_plugin.counts import Count, Natural
from slm_plugin.errors import TargetError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.families.family import Family
from slm_plugin.plans import PruningPlan
from slm_plugin.plans.rules import check_rule
from slm_plugin.pruners import base
from slm_plugin.pruners.depth.depth_plan import kinds_of, unlike
from slm_plugin.pruners.depth.measures.criteria import (
    CRITERIA,
    CriterionName,
    refuse_threshold,
)
from slm_plugin.pruners.depth.search.best_first import best_first
from slm_plugin.pruners.depth.search.budgeted import budgeted
from slm_plugin.pruners.depth.search.found_plan import found_plan
from slm_plugin.pruners.depth.search.runs import Found
from slm_plugin.pruners.depth.search.sliding import WalkRules, walk, walk_to_size
from slm_plugin.pruners.depth.search.trials import Trials, trials_of
from slm_plugin.registry import register_pruner

if TYPE_CHECKING:
    from slm_plugin.session import Session

RELEASED: dict[str, Any] = {
    "criterion": "flat_cosine",
    "search": "sliding",
    "merge_rule": "telescoped",
    "protect_first": 0,
    "protect_last": 1,
}


class SlmOptions(Options):
    """How windows are chosen and merged.

    ``compatibility: released`` is the behaviour of the released code: it merges only the weights of
    projections, so that biases and query and key norms are the lowest layer's, discards a window
    that is still growing at the bottom (so a low threshold prunes nothing), repeats an idle trial
    after every merge, and evaluates every trial on all samples. The released code treats NaN as a
    rejection and may then not terminate; here NaN is an error.
    """

    former: ClassVar = {
        name: f"{holds} unless `compatibility: released` is set"
        for name, holds in {
            "weights_only": "biases and query and key norms follow their projections",
            "flush_tail": "a window that is still growing at the bottom is merged",
            "trial_after_commit": "the idle trial after a merge is left out",
            "early_rejection": "a trial ends once it cannot succeed",
        }.items()
    }

    compatibility: Annotated[
        Literal["none", "released"],
        Field(description="released: the published code's loop, trial for trial"),
    ] = "none"
    criterion: Annotated[
        CriterionName,
        Field(description="similarity of the merged model to the original; published: flat_cosine"),
    ] = "flat_cosine"
    search: Annotated[
        Literal["sliding", "greedy", "budgeted"],
        Field(
            description="sliding: the published walk; greedy: repeatedly the best adjacent "
            "merge; budgeted: the cheapest disjoint windows by dynamic programming"
        ),
    ] = "sliding"
    beam_width: Annotated[
        Count, Field(description="number of partly merged models that the greedy search keeps")
    ] = 1
    merge_rule: Annotated[
        str,
        AfterValidator(check_rule),
        Field(
            description="telescoped (published), rdsc, mean, activation, keep_low, keep_high, "
            "ema(w), or best: for every window the rule with the best criterion value"
        ),
    ] = "telescoped"
    protect_first: Annotated[Natural, Field(description="lowest layers to protect")] = 0
    protect_last: Annotated[Natural, Field(description="highest layers to protect")] = 1

    @model_validator(mode="before")
    @classmethod
    def _as_released(cls, given: Any) -> Any:
        if not isinstance(given, dict) or given.get("compatibility") != "released":
            return given
        for name, value in RELEASED.items():
            if given.get(name, value) != value:
                raise ValueError(f"compatibility: released means {name}: {value}; remove one")
        return {**given, **RELEASED}

    @model_validator(mode="after")
    def _beam_of_the_greedy_search(self) -> SlmOptions:
        if self.beam_width > 1 and self.search != "greedy":
            raise ValueError("beam_width needs search: greedy")
        return self


@register_pruner("slm")
class SlidingLayerMerging(base.Pruner):
    """Merge windows of layers, top first, while the final hidden state stays similar."""

    kind: ClassVar = "depth"
    targets: ClassVar = ("threshold", "layers_removed", "ratio", "parameters")
    whole_layers: ClassVar[bool] = True
    streams: ClassVar = True
    merges: ClassVar = True
    keeps_trials = True
    Options: ClassVar = SlmOptions
    options: SlmOptions

    def check(self) -> None:
        """Check the kind of target and the range of the threshold."""
        refuse_threshold(self.target.threshold, self.options.criterion)
        self._check_kind()

    def unsuited_options(self, family: Family, config: Mapping[str, Any]) -> str:
        """An encoder has no logits, and its samples are padded."""
        chosen = CRITERIA[self.options.criterion]
        if not family.by_tensors:
            return ""
        if self._released:
            return "the released code merges projections by Llama's names; remove `compatibility`"
        if chosen.padded:
            return ""
        fit = " or ".join(name for name, one in CRITERIA.items() if one.padded)
        why = "needs logits" if chosen.logits else "compares samples of one length, without padding"
        return f"its criterion '{self.options.criterion}' {why}; set criterion: {fit}"

    def _check_kind(self) -> None:
        if self.target.kind == "threshold" and self.options.search == "budgeted":
            raise TargetError(
                "search: budgeted needs a size, not a threshold",
                hint="give layers_removed, ratio or parameters",
            )
        if self.target.kind != "threshold" and self._released:
            raise TargetError(
                f"the released code supports only a threshold, not {self.target.describe()}",
                hint="give a threshold or remove `compatibility: released`",
            )

    def check_target(self, original: Dimensions, current: Dimensions) -> None:
        """Check that the search can reach the target with the protected layers."""
        self._check_target(original, current, self._rules(current))

    def _check_target(self, original: Dimensions, current: Dimensions, rules: WalkRules) -> None:
        self._check_kind()
        super().check_target(original, current)
        if self.target.kind == "threshold":
            return
        wanted = base.layers_to_remove(self.target, original, current)
        protection = f"protect_first {rules.protect_first} and protect_last {rules.protect_last}"
        protection += unlike(rules.kinds)
        base.refuse_beyond(self.target, wanted, rules.most, rules.layers, protection)

    def plan(self, session: Session) -> PruningPlan:
        """Search for the windows to merge.

        Raises:
            TargetError: The target cannot be reached.
            NumericalError: The model or a trial gives NaN.
        """
        view = session.view
        before = view.dimensions()
        rules = self._rules(before, kinds_of(view))
        self._check_target(session.original, before, rules)
        options = self.options
        with trials_of(
            session,
            self.name,
            options.criterion,
            options.merge_rule,
            weights_only=self._released,
        ) as trials:
            found = self._search(session, before, rules, trials)
        return found_plan(self, session, options.criterion, trials, found)

    @property
    def _released(self) -> bool:
        return self.options.compatibility == "released"

    def _rules(self, model: Dimensions, kinds: tuple[object, ...] = ()) -> WalkRules:
        return WalkRules(
            layers=model.layers,
            protect_first=max(self.options.protect_first, model.fixed_layers),
            protect_last=self.options.protect_last,
            released=self._released,
            kinds=kinds,
        )

    def _search(
        self, session: Session, before: Dimensions, rules: WalkRules, trials: Trials
    ) -> Found:
        search = self.options.search
        if self.target.threshold is not None:
            if search == "sliding":
                return walk(rules, self.target.threshold, trials)
            return best_first(
                rules,
                trials,
                threshold=self.target.threshold,
                beam_width=self.options.beam_width,
            )
        wanted = base.layers_to_remove(self.target, session.original, before)
        if search == "greedy":
            return best_first(rules, trials, wanted=wanted, beam_width=self.options.beam_width)
        if search == "budgeted":
            return budgeted(rules, trials, wanted, trials.same)
        return walk_to_size(rules, wanted, trials, trials.greatest)
