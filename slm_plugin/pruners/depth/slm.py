"""Sliding Layer Merging: merge runs of layers while the final hidden state stays similar.

Source: SLM (arXiv 2502.19159), later "Sliding-Window Merging". The defaults are the released
code's, except for three mends, each with an option where it changes a result: see `SlmOptions`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, ClassVar

import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn

from slm_plugin.calibration.captures import run_batches
from slm_plugin.errors import TargetError, UnsupportedModelError
from slm_plugin.models.view import Dimensions
from slm_plugin.progress import counting
from slm_plugin.pruners import base
from slm_plugin.pruners.depth.merge_rules import check_rule, merged_layer
from slm_plugin.pruners.depth.similarity import flat_cosine
from slm_plugin.pruners.depth.sliding import Rules, Walk, Window, walk, walk_to_size
from slm_plugin.pruners.plan import MergeLayers, PruningPlan, Trial
from slm_plugin.pruners.portability import portability
from slm_plugin.registry import register_pruner
from slm_plugin.session import Session


class SlmOptions(base.Options):
    """How the walk merges.

    The released code has ``flush_tail: false`` (a window that still grows at the bottom is lost,
    so that a low threshold prunes nothing) and ``trial_after_commit: true`` (which costs a trial
    and decides nothing). It takes NaN for "too different" and can loop for ever on it; here NaN
    is an error.
    """

    merge_rule: Annotated[
        str,
        AfterValidator(check_rule),
        Field(description="telescoped (released), rdsc, mean, keep_low, keep_high or ema(w)"),
    ] = "telescoped"
    protect_first: Annotated[int, Field(ge=0, description="lowest layers that stay")] = 0
    protect_last: Annotated[int, Field(ge=0, description="highest layers that stay")] = 1
    flush_tail: Annotated[
        bool, Field(description="merge a window that still grows at the bottom; released: false")
    ] = True
    trial_after_commit: Annotated[
        bool, Field(description="repeat the released loop's idle trials; released: true")
    ] = False


@register_pruner("slm")
class SlidingLayerMerging(base.Pruner):
    """Merge runs of layers, top first, while the final hidden state stays similar."""

    kind: ClassVar = "depth"
    targets: ClassVar = ("threshold", "layers_removed", "ratio", "parameters")
    streams: ClassVar = True
    Options: ClassVar = SlmOptions
    options: SlmOptions

    def check_target(self, original: Dimensions, current: Dimensions) -> None:
        """Refuse what the protected layers do not leave room for."""
        super().check_target(original, current)
        rules = self._rules(current.layers)
        if self.target.kind == "threshold":
            return
        wanted = base.layers_to_remove(self.target, original, current)
        if wanted > rules.most:
            raise TargetError(
                f"the target ({self.target.describe()}) means {wanted} layers; with "
                f"protect_first {rules.protect_first} and protect_last {rules.protect_last} "
                f"at most {rules.most} of {rules.layers} can go",
                hint="lower the target or the protection",
            )

    def plan(self, session: Session) -> PruningPlan:
        """Walk, and write down which runs of layers merge.

        Raises:
            TargetError: The target cannot be reached.
            UnsupportedModelError: The layers are of different kinds.
            NumericalError: The model or a trial gives NaN.
        """
        view = session.view
        before = view.dimensions()
        self.check_target(session.original, before)
        kinds = sorted(set(getattr(view.config, "layer_types", None) or ()))
        if len(kinds) > 1:
            raise UnsupportedModelError(
                f"the model's layers are of different kinds ({', '.join(kinds)})",
                hint="slm merges only layers of one kind",
            )
        rules = self._rules(before.layers)
        with counting("slm: trials") as count:
            trials = MergeTrials(session, self.options.merge_rule, count)
            chosen, notes = self._decide(rules, session, before, trials)
        after = before.without_layers(chosen.removed)
        made = set(chosen.trials)
        return PruningPlan(
            pruner=self.name,
            kind=self.kind,
            options=self.options.model_dump(),
            target=self.target,
            fingerprint=session.fingerprint(),
            before=before,
            after=after,
            operations=tuple(
                MergeLayers(first=first, last=last, rule=self.options.merge_rule)
                for first, last in chosen.windows
            ),
            threshold=chosen.threshold,
            trials=chosen.trials,
            explored=tuple(
                trial for trial in trials.evaluated(chosen.threshold) if trial not in made
            ),
            notes=notes,
            warnings=portability(before, after, view.config),
        )

    def _rules(self, layers: int) -> Rules:
        return Rules(
            layers=layers,
            protect_first=self.options.protect_first,
            protect_last=self.options.protect_last,
            flush_tail=self.options.flush_tail,
            trial_after_commit=self.options.trial_after_commit,
        )

    def _decide(
        self, rules: Rules, session: Session, before: Dimensions, trials: MergeTrials
    ) -> tuple[Walk, tuple[str, ...]]:
        """The walk to follow, and what a reader should know of it."""
        if self.target.threshold is not None:
            made = walk(rules, self.target.threshold, trials.similarity)
            return made, () if made.windows else ("no run of layers merges",)
        wanted = base.layers_to_remove(self.target, session.original, before)
        made, tried = walk_to_size(rules, wanted, trials.similarity)
        share = wanted * before.layer_parameters / session.original.parameters
        return made, (
            f"{wanted} {'layer is' if wanted == 1 else 'layers are'} {share:.2%} of the original "
            "parameters",
            f"{made.threshold:.4f} is the highest of {tried} thresholds tried that reaches this "
            f"size; the walk stops there ({trials.count} distinct trials in all)",
        )


class MergeTrials:
    """Evaluates merges on the captured calibration set; no trial is evaluated twice.

    Layers below a window are still the original ones, so their captured outputs serve every
    trial: only the merged layer, the layers above it and the final norm run. No logits, no copy.

    Args:
        session: Gives the layers and what they see.
        rule: The merge rule.
        count: Called for every trial that is evaluated.
    """

    def __init__(self, session: Session, rule: str, count: Callable[[], None]) -> None:
        self._view = session.view
        self._captured = session.captured()
        self._rule = rule
        self._tick = count
        self._known: dict[tuple[int, int, tuple[Window, ...]], float] = {}
        self._committed: dict[Window, nn.Module] = {}

    @property
    def count(self) -> int:
        """Trials evaluated so far."""
        return len(self._known)

    def similarity(self, first: int, last: int, committed: tuple[Window, ...]) -> float:
        """Mean over the samples of `flat_cosine` to the original model's final hidden state."""
        key = (first, last, committed)
        if key not in self._known:
            self._known[key] = self._evaluate(first, last, committed)
            self._tick()
        return self._known[key]

    def evaluated(self, threshold: float) -> Iterator[Trial]:
        """All trials so far in the order of their evaluation, judged by one threshold."""
        for (first, last, committed), value in self._known.items():
            yield Trial(
                first=first,
                last=last,
                committed=committed,
                similarity=value,
                accepted=value > threshold,
            )

    @torch.inference_mode()
    def _evaluate(self, first: int, last: int, committed: tuple[Window, ...]) -> float:
        layers = self._view.layers
        merged = merged_layer(self._rule, list(layers)[first : last + 1])
        suffix = [merged, *self._above(last, committed)]
        cosines: list[Tensor] = []
        for batch, hidden in run_batches(suffix, self._captured, first):
            cosines.append(flat_cosine(batch.final, self._view.norm(hidden)))
        return float(torch.cat(cosines).mean())

    def _above(self, last: int, committed: tuple[Window, ...]) -> Iterator[nn.Module]:
        """The layers above a window, with the windows that are merged already."""
        runs = {window[0]: window for window in committed}
        index = last + 1
        while index < len(self._view.layers):
            if index in runs:
                window = runs[index]
                if window not in self._committed:
                    run = list(self._view.layers)[window[0] : window[1] + 1]
                    self._committed[window] = merged_layer(self._rule, run)
                yield self._committed[window]
                index = window[1] + 1
            else:
                yield self._view.layers[index]
                index += 1
