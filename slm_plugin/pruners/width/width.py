"""Uniform width pruning by any of the published scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from slm_plugin.component import Options
from slm_plugin.counts import Count
from slm_plugin.models.view import Dimensions
from slm_plugin.plans import UnitScores
from slm_plugin.pruners.width.budget import Cut
from slm_plugin.pruners.width.few_tokens import fit_caution, score_caution
from slm_plugin.pruners.width.importance import (
    magnitude,
    rounded,
    taylor,
    taylor_second,
    taylor_sum,
)
from slm_plugin.pruners.width.input_sums import LayerInputs, ReaderInputs, layer_inputs
from slm_plugin.pruners.width.layer_by_layer import Restoration, scored_in_turn
from slm_plugin.pruners.width.layer_scores import channel_scores, group_scores
from slm_plugin.pruners.width.masked_losses import learned_scores
from slm_plugin.pruners.width.policy_gradient import Descent, Estimator
from slm_plugin.pruners.width.uniform import KvGroups, MultipleOf, UniformWidth, operations_of
from slm_plugin.registry import register_pruner
from slm_plugin.target import Target

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.models.families.family import Family
    from slm_plugin.session import Session

ScoreName = Literal[
    "activation",
    "contribution",
    "flap",
    "leverage",
    "magnitude",
    "obs",
    "policy_gradient",
    "taylor",
    "taylor_mixed",
    "taylor_second",
    "taylor_sum",
    "wanda_sp",
]
# Scores from the Gram matrix of all columns.
BY_GRAM = ("leverage", "obs")
# Scores of a layer that depend on what was removed below it.
IN_TURN = ("obs",)
# Errors of a curve may differ little.
CURVE_DIGITS = 9


class WidthOptions(Options):
    """The score, the restoration, and how the removal is split between MLP and attention."""

    score: Annotated[
        ScoreName,
        Field(
            description="those of Taylor look at the loss's gradient, policy_gradient at losses of "
            "masked models, magnitude at the weights alone, the others at what each layer computes"
        ),
    ] = "taylor"
    restore: Annotated[
        Literal["dense", "own", "none"],
        Field(
            description="refit the projections that read the remaining units toward the dense "
            "model's states or toward what the layer itself gave before the cut; none removes only"
        ),
    ] = "dense"
    kv_groups: KvGroups = 0
    multiple_of: MultipleOf = 8
    steps: Annotated[Count, Field(description="of policy_gradient: updates")] = 200
    learning_rate: Annotated[
        float, Field(gt=0, le=1, description="of policy_gradient: rate of the first update")
    ] = 2e-3
    estimator: Annotated[
        Estimator,
        Field(
            description="of policy_gradient: with the true score function, or weighted as in the "
            "released code"
        ),
    ] = "unbiased"

    @model_validator(mode="after")
    def _of_the_policy_gradient(self) -> WidthOptions:
        fields = type(self).model_fields
        for name in ("steps", "learning_rate", "estimator"):
            if self.score != "policy_gradient" and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name} needs score: policy_gradient")
        return self


@register_pruner("width")
class Width(UniformWidth):
    """Remove the same number of MLP channels, and of KV groups, from every layer by a score.

    The scores see the model as it is when the stage begins; those of ``obs`` see it as pruned and
    restored below each layer. A recipe runs the restoration, ``recover: refit``, after the plan.
    """

    streams: ClassVar[bool] = True
    Options = WidthOptions

    def __init__(self, options: WidthOptions, target: Target) -> None:
        super().__init__(
            options, target, kv_groups=options.kv_groups, multiple_of=options.multiple_of
        )
        self.options: WidthOptions = options
        self.keeps_trials = options.score == "policy_gradient"

    @property
    def needs_calibration(self) -> bool:
        """The restoration and all scores but the magnitude look at data."""
        return self.options.score != "magnitude" or self.options.restore != "none"

    @property
    def without_calibration(self) -> str:
        """The magnitude needs data for its restoration alone."""
        return "set `restore: none`" if self.options.score == "magnitude" else ""

    @property
    def whole_model(self) -> str:
        """Gradients go through all layers, and a restoration writes weights."""
        if self.options.score.startswith("taylor"):
            return f"`score: {self.options.score}` needs gradients (name another score)"
        if self.keeps_trials:
            return "`score: policy_gradient` runs all layers at every step (name another score)"
        if self.options.restore != "none":
            return "it restores weights (set `restore: none`)"
        return ""

    def unsuited_options(self, family: Family) -> str:
        """What is restored must be linear maps."""
        if self.options.restore == "none" or not family.no_fit:
            return ""
        return f"{family.no_fit}; set `restore: none`"

    @property
    def followed_by(self) -> Mapping[str, Any] | None:
        """The restoration; of the attention too where KV groups go."""
        if self.options.restore == "none":
            return None
        return {
            "recover": "refit",
            "toward": self.options.restore,
            "o_proj": self._restoration.o_proj,
        }

    @property
    def _restoration(self) -> Restoration:
        return Restoration(self.options.restore, o_proj=self.options.kv_groups != 0)

    def cautions(self, session: Session, cut: Cut) -> Iterator[str]:
        """Too few tokens for the number of columns."""
        before = session.view.dimensions()
        heads = before.attention_heads * before.head_dim if cut.kv_groups else 0
        channels = before.intermediate_size
        if self.options.score in BY_GRAM:
            ranked = max(heads, channels if cut.channels else 0)
            yield from score_caution(session, self.options.score, ranked)
        if self.options.restore != "none":
            yield from fit_caution(session, channels - cut.channels)

    def score(self, session: Session, cut: Cut) -> tuple[UnitScores, ...]:
        """See `UniformWidth.score`."""
        view, name = session.view, self.options.score
        if name == "magnitude":
            return magnitude(view)
        if name == "taylor":
            return taylor(view, session.batches())
        if name == "taylor_sum":
            return taylor_sum(view, session.batches())
        if name in ("taylor_second", "taylor_mixed"):
            return taylor_second(view, session.batches(), mixed=name == "taylor_mixed")
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
                for operation in operations_of(scores, cut)
            }

        return scored_in_turn(
            session,
            before.without_units(cut.channels, cut.kv_groups),
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
            scores = channel_scores(name, reader, cut.channels)
            found.append(_scores(reader, "mlp_channel", scores))
        if cut.kv_groups:
            reader = inputs.read_by("o_proj")
            size = dimensions.queries_per_group * dimensions.head_dim
            scores = group_scores(name, reader, cut.kv_groups, size)
            found.append(_scores(reader, "kv_group", scores))
        return found


def _scores(
    inputs: ReaderInputs, unit: Literal["mlp_channel", "kv_group"], scores: Tensor
) -> UnitScores:
    return UnitScores(
        layer=inputs.layer, unit=unit, scores=rounded(scores, inputs.layer, CURVE_DIGITS)
    )
