"""Uniform width pruning by any of the published scores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from slm_plugin.component import Options
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.plans import UnitScores
from slm_plugin.pruners.width import input_scores
from slm_plugin.pruners.width.allocation.choice import (
    NOT_POOLED,
    STRETCHED,
    WITHOUT_DATA,
    AllocationName,
    Stage,
    allocated,
)
from slm_plugin.pruners.width.allocation.limits import channel_limits
from slm_plugin.pruners.width.allocation.projection import Limits, kept_channels
from slm_plugin.pruners.width.brain_surgeon import error_curve
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
from slm_plugin.pruners.width.uniform import KvGroups, MultipleOf, UniformWidth, operations_of
from slm_plugin.registry import register_pruner
from slm_plugin.surgery.portability import refuse_unloadable
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
    "taylor",
    "taylor_mixed",
    "taylor_second",
    "taylor_sum",
    "wanda_sp",
]
# Scores of single columns of the projections that read the units.
BY_COLUMN: dict[str, Callable[[ReaderInputs], Tensor]] = {
    "activation": input_scores.activation,
    "flap": input_scores.flap,
    "leverage": input_scores.leverage,
    "wanda_sp": input_scores.wanda_sp,
}
# Scores from the Gram matrix of all columns.
BY_GRAM = ("leverage", "obs")
# Scores of a layer that depend on what was removed below it.
IN_TURN = ("obs",)
# Relative to the mean sparsity: what AlphaPruning releases as ``epsilon``.
SPREAD = 0.3
FLOOR = 0.1
# Errors of a curve may differ little.
CURVE_DIGITS = 9


class WidthOptions(Options):
    """The score, the restoration, and how the removal is split between layers and their parts."""

    score: Annotated[
        ScoreName,
        Field(
            description="those of Taylor look at the loss's gradient, magnitude at the weights "
            "alone, the others at what each layer computes"
        ),
    ] = "taylor"
    restore: Annotated[
        Literal["dense", "own", "none"],
        Field(
            description="refit the projections that read the remaining units toward the dense "
            "model's states or toward what the layer itself gave before the cut; none removes only"
        ),
    ] = "dense"
    allocation: Annotated[
        AllocationName,
        Field(
            description="how many MLP channels each layer loses; with all but uniform, layers "
            "differ, and a checkpoint is padded with zeros"
        ),
    ] = "uniform"
    spread: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description=f"how far {', '.join(STRETCHED)} take the layers' shares apart: at 0.3 "
            "the least is about 0.7 of the mean",
        ),
    ] = SPREAD
    floor: Annotated[
        float,
        Field(
            ge=0,
            lt=1,
            description="smallest share of its MLP channels that a layer keeps, where layers "
            "may differ",
        ),
    ] = FLOOR
    kv_groups: KvGroups = 0
    multiple_of: MultipleOf = 8

    @model_validator(mode="after")
    def _used(self) -> Self:
        """Settings that have no effect, or no meaning, are mistakes."""
        if self.allocation == "global" and self.score in NOT_POOLED:
            raise ValueError(
                f"score {self.score} ranks the channels of one layer and cannot be compared "
                "between layers; choose another score or allocation"
            )
        if self.spread != SPREAD and self.allocation not in STRETCHED:
            raise ValueError(
                f"spread has no effect with allocation {self.allocation}; leave it out, or choose "
                f"{', '.join(STRETCHED)}"
            )
        return self


@register_pruner("width")
class Width(UniformWidth):
    """Remove MLP channels, and KV groups, from every layer by a score.

    By default every layer loses the same number; `allocation` spreads the channels over the layers.

    The scores see the model as it is when the stage begins; those of ``obs`` see it as pruned and
    restored below each layer. A recipe runs the restoration, ``recover: refit``, after the plan.
    """

    streams: ClassVar[bool] = True
    Options = WidthOptions
    on_uneven: ClassVar[bool] = True

    def __init__(self, options: WidthOptions, target: Target) -> None:
        super().__init__(
            options, target, kv_groups=options.kv_groups, multiple_of=options.multiple_of
        )
        self.options: WidthOptions = options

    @property
    def leaves_uneven(self) -> bool:
        """Every allocation but the uniform one."""
        return self.options.allocation != "uniform"

    @property
    def needs_calibration(self) -> bool:
        """The restoration, most allocations and all scores but the magnitude look at data."""
        options = self.options
        return (
            options.score != "magnitude"
            or options.restore != "none"
            or options.allocation not in WITHOUT_DATA
        )

    @property
    def without_calibration(self) -> str:
        """The restoration can be left out where nothing else needs data."""
        options = self.options
        alone = options.score == "magnitude" and options.allocation in WITHOUT_DATA
        return "set `restore: none`" if alone else ""

    @property
    def whole_model(self) -> str:
        """Gradients and allocations take in all layers, and a restoration writes weights."""
        if self.options.score.startswith("taylor"):
            return f"`score: {self.options.score}` needs gradients (name another score)"
        if self.leaves_uneven:
            return f"`allocation: {self.options.allocation}` compares layers (set it to uniform)"
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
        cut = Cut.keeping(kept_channels([1.0] * current.layers, limits), kv_groups, current)
        refuse_unloadable(current, cut.after(current))
        return cut

    def decide(self, session: Session, cut: Cut) -> tuple[Cut, tuple[UnitScores, ...]]:
        """See `UniformWidth.decide`."""
        before = session.view.dimensions()
        if self._keeps_even(before):
            return super().decide(session, cut)
        stage = Stage(session, *self._limits(session.original, before), self.score)
        return allocated(self.options.allocation, self.options.spread, stage)

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
        )

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
        return tuple(sorted(found, key=lambda scores: scores.unit, reverse=True))

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
            cut.after(before),
            self._restoration,
            partial(self._of_layer, cut=cut, dimensions=before),
            removed,
        )

    def _of_layer(
        self, inputs: LayerInputs, cut: Cut, dimensions: Dimensions
    ) -> Sequence[UnitScores]:
        found = []
        if cut.channels:
            reader = inputs.read_by("down_proj")
            scores = self._of_channels(reader, cut.of_layer(inputs.index))
            found.append(_scores(reader, "mlp_channel", scores))
        if cut.kv_groups:
            reader = inputs.read_by("o_proj")
            scores = self._of_groups(reader, cut.kv_groups, dimensions)
            found.append(_scores(reader, "kv_group", scores))
        return found

    def _of_channels(self, inputs: ReaderInputs, removed: int) -> Tensor:
        if self.options.score == "obs":
            return error_curve(inputs, removed, size=1)
        if self.options.score == "contribution":
            return input_scores.contribution(inputs, removed)
        return BY_COLUMN[self.options.score](inputs)

    def _of_groups(self, inputs: ReaderInputs, removed: int, dimensions: Dimensions) -> Tensor:
        """Scores of KV groups: of their columns together, or the sum over them."""
        size = dimensions.queries_per_group * dimensions.head_dim
        if self.options.score == "obs":
            return error_curve(inputs, removed, size)
        if self.options.score == "contribution":
            return input_scores.group_contribution(inputs, size)
        return BY_COLUMN[self.options.score](inputs).reshape(-1, size).sum(1)


def _scores(
    inputs: ReaderInputs, unit: Literal["mlp_channel", "kv_group"], scores: Tensor
) -> UnitScores:
    return UnitScores(
        layer=inputs.layer, unit=unit, scores=rounded(scores, inputs.layer, CURVE_DIGITS)
    )
