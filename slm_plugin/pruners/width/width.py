"""Uniform width pruning by any of the published scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from slm_plugin.models.dimensions import Dimensions
from slm_plugin.plans import UnitScores
from slm_plugin.pruners.input_sums import LayerInputs, ReaderInputs, layer_inputs
from slm_plugin.pruners.width.allocation.choice import Stage, allocated
from slm_plugin.pruners.width.allocation.limits import channel_limits
from slm_plugin.pruners.width.allocation.projection import Limits, kept_channels
from slm_plugin.pruners.width.budget import Cut
from slm_plugin.pruners.width.few_tokens import fit_caution, score_caution
from slm_plugin.pruners.width.heads import HeadUnit, unsuited_query_heads
from slm_plugin.pruners.width.hidden_cut import HiddenCut
from slm_plugin.pruners.width.hidden_scores import ROTATIONS, StreamPlan, stream_plan
from slm_plugin.pruners.width.importance import (
    magnitude,
    rounded,
    taylor,
    taylor_second,
    taylor_sum,
)
from slm_plugin.pruners.width.layer_by_layer import Restoration, scored_in_turn
from slm_plugin.pruners.width.layer_scores import channel_scores, head_scores
from slm_plugin.pruners.width.masked_losses import learned_scores
from slm_plugin.pruners.width.policy_gradient import Descent
from slm_plugin.pruners.width.uniform import UniformWidth, operations_of
from slm_plugin.pruners.width.width_options import WidthOptions
from slm_plugin.registry import register_pruner
from slm_plugin.surgery.portability import refuse_unloadable
from slm_plugin.target import Target

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.models.families.family import Family
    from slm_plugin.session import Session

# Scores from the Gram matrix of all columns.
BY_GRAM = ("leverage", "obs")
# Scores of a layer that depend on what was removed below it.
IN_TURN = ("obs",)
# Errors of a curve may differ little.
CURVE_DIGITS = 9


@register_pruner("width")
class Width(UniformWidth):
    """Remove MLP channels, heads, and channels of the residual stream by a score.

    By default every layer loses the same number; `allocation` spreads the channels over the layers.

    The scores see the model as it is when the stage begins; those of ``obs`` see it as pruned and
    restored below each layer. A recipe runs the restoration, ``recover: refit``, after the plan.
    """

    streams: ClassVar[bool] = True
    Options = WidthOptions
    on_uneven: ClassVar[bool] = True

    def __init__(self, options: WidthOptions, target: Target) -> None:
        super().__init__(
            options,
            target,
            kv_groups=options.kv_groups,
            multiple_of=options.multiple_of,
            query_heads=options.query_heads,
            hidden=HiddenCut(options.hidden_channels, ROTATIONS.get(options.hidden_score or "")),
        )
        self.options: WidthOptions = options
        self.keeps_trials = options.score == "policy_gradient"

    @property
    def leaves_uneven(self) -> bool:
        """Every allocation but the uniform one."""
        return self.options.allocation != "uniform"

    @property
    def without_operators(self) -> str:
        """A rotation of every block needs them."""
        return "set `hidden_score: pca`" if self.options.inserts_operators else ""

    @property
    def needs_calibration(self) -> bool:
        """The restoration, most allocations and all scores but the magnitude look at data."""
        return not self.options.plans_from_weights or self.options.restore != "none"

    @property
    def without_calibration(self) -> str:
        """The restoration can be left out where nothing else needs data."""
        return "set `restore: none`" if self.options.plans_from_weights else ""

    @property
    def whole_model(self) -> str:
        """Gradients and allocations take in all layers, and a restoration writes weights."""
        if self.options.score.startswith("taylor"):
            return f"`score: {self.options.score}` needs gradients (name another score)"
        if self.keeps_trials:
            return "`score: policy_gradient` runs all layers at every step (name another score)"
        if self.leaves_uneven:
            return f"`allocation: {self.options.allocation}` compares layers (set it to uniform)"
        if self.options.hidden_channels:
            return "hidden channels are removed from all weights (leave hidden_channels out)"
        if self.options.restore != "none":
            return "it restores weights (set `restore: none`)"
        return ""

    def unsuited_options(self, family: Family, config: Mapping[str, Any]) -> str:
        """Heads and hidden channels must be there; what is restored must be linear maps."""
        lacking = unsuited_query_heads(self.options.query_heads, family, config)
        if not lacking and self.options.hidden_channels and family.no_hidden_channels:
            lacking = f"{family.no_hidden_channels}; leave hidden_channels out"
        if lacking or self.options.restore == "none" or not family.no_fit:
            return lacking
        return f"{family.no_fit}; set `restore: none`"

    @property
    def followed_by(self) -> Mapping[str, Any] | None:
        """The restoration; of the attention too where heads or hidden channels go."""
        if self.options.restore == "none":
            return None
        return {
            "recover": "refit",
            "toward": self.options.restore,
            "o_proj": self._restoration.o_proj,
        }

    @property
    def _restoration(self) -> Restoration:
        options = self.options
        heads = options.kv_groups != 0 or options.query_heads > 0
        return Restoration(options.restore, o_proj=heads or options.hidden_channels > 0)

    def cautions(self, session: Session, cut: Cut) -> Iterator[str]:
        """Too few tokens for the number of columns."""
        before = session.view.dimensions()
        heads = before.attention_heads * before.head_dim if cut.heads else 0
        channels = before.intermediate_size
        left = cut.after(before).intermediate_size
        if self.options.score in BY_GRAM:
            ranked = max(heads, channels if cut.channels else 0)
            yield from score_caution(session, self.options.score, ranked)
        if self.options.restore != "none":
            yield from fit_caution(session, left)

    def cut(self, original: Dimensions, current: Dimensions) -> Cut:
        """See `UniformWidth.cut`; of layers that may differ, the same share to a step."""
        if self._keeps_even(current):
            return super().cut(original, current)
        limits, kv_groups = self._limits(original, current)
        kept = kept_channels([1.0] * current.layers, limits)
        cut = Cut.keeping(kept, kv_groups, current, self.options.query_heads)
        cut = replace(cut, hidden=self._hidden)
        refuse_unloadable(current, cut.after(current))
        return cut

    def decide(self, session: Session, cut: Cut) -> tuple[Cut, tuple[UnitScores, ...]]:
        """See `UniformWidth.decide`."""
        before = session.view.dimensions()
        if self._keeps_even(before):
            return super().decide(session, cut)
        limits, groups = self._limits(session.original, before)
        stage = Stage(session, limits, groups, self.score, self.options.query_heads)
        decided, scores = allocated(self.options.allocation, self.options.spread, stage)
        return replace(decided, hidden=cut.hidden), scores

    def stream_plan(self, session: Session, cut: Cut) -> StreamPlan:
        """See `UniformWidth.stream_plan`."""
        return stream_plan(self.options.ranks_hidden, session, cut.hidden.count)

    def _keeps_even(self, current: Dimensions) -> bool:
        return self.options.allocation == "uniform" and not current.layer_widths

    def _limits(self, original: Dimensions, current: Dimensions) -> tuple[Limits, int]:
        options = self.options
        return channel_limits(
            self.target,
            original,
            current,
            kv_groups=options.kv_groups,
            multiple_of=options.multiple_of,
            floor=options.floor,
            query_heads=options.query_heads,
            hidden=self._hidden,
        )

    def score(self, session: Session, cut: Cut) -> tuple[UnitScores, ...]:
        """See `UniformWidth.score`."""
        view, name, heads = session.view, self.options.score, cut.heads or "kv_group"
        if name == "magnitude":
            return magnitude(view, heads)
        if name == "taylor":
            return taylor(view, session.batches(), heads)
        if name == "taylor_sum":
            return taylor_sum(view, session.batches(), heads)
        if name in ("taylor_second", "taylor_mixed"):
            return taylor_second(view, session.batches(), heads, mixed=name == "taylor_mixed")
        found = self._in_turn(session, cut) if name in IN_TURN else self._at_once(session, cut)
        ordered = tuple(sorted(found, key=lambda scores: scores.unit, reverse=True))
        if name != "policy_gradient":
            return ordered
        options = self.options
        descent = Descent(options.steps, options.learning_rate, options.estimator, session.seed)
        return learned_scores(session, ordered, cut, descent)

    def _at_once(self, session: Session, cut: Cut) -> Iterator[UnitScores]:
        dimensions = session.view.dimensions()
        for inputs in layer_inputs(session):
            yield from self._of_layer(inputs, cut, dimensions)

    def _in_turn(self, session: Session, cut: Cut) -> Iterator[UnitScores]:
        before = session.view.dimensions()

        def removed(scores: UnitScores) -> dict[str, list[int]]:
            return {
                operation.unit: sorted(set(range(len(scores.scores))) - set(operation.kept))
                for operation in operations_of(scores, cut, before)
            }

        return scored_in_turn(
            session,
            cut.after(before),
            self._restoration,
            partial(self._of_layer, cut=cut, dimensions=before),
            removed,
        )

    def _of_layer(
        self, inputs: LayerInputs, cut: Cut, dimensions: Dimensions
    ) -> Sequence[UnitScores]:
        found, name = [], self.options.score
        if cut.channels:
            reader = inputs.read_by("down_proj")
            scores = channel_scores(name, reader, cut.of_layer(inputs.index))
            found.append(_scores(reader, "mlp_channel", scores))
        if cut.heads:
            reader = inputs.read_by("o_proj")
            found.append(_scores(reader, cut.heads, head_scores(name, reader, cut, dimensions)))
        return found


def _scores(
    inputs: ReaderInputs, unit: Literal["mlp_channel"] | HeadUnit, scores: Tensor
) -> UnitScores:
    return UnitScores(
        layer=inputs.layer, unit=unit, scores=rounded(scores, inputs.layer, CURVE_DIGITS)
    )
