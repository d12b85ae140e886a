"""Operations of a plan: what each one uses and removes, as data.

How they are carried out is in `slm_plugin.surgery`.

A decoder is the sequence attention 0, MLP 0, attention 1, MLP 1, … of blocks on one residual
stream, each with its own norm. An operation on layers removes some of these blocks; what is left
alternates, and each attention forms a layer with the MLP after it (`plans.layout`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Annotated, ClassVar, Literal, NamedTuple

from pydantic import FailFast, Field, model_validator
from typing_extensions import Self

from slm_plugin.errors import PlanError
from slm_plugin.models.dimensions import BasisOf, Dimensions
from slm_plugin.plans.rules import check_planned_rule
from slm_plugin.record import Record

# Beyond any model; larger numbers would not fit a tensor of indices.
MOST = 2**31 - 1
Index = Annotated[int, Field(ge=0, le=MOST)]
Share = Annotated[float, Field(ge=0, le=1)]
# Report only the first invalid entry of a long list.
Indices = Annotated[tuple[Index, ...], Field(min_length=1), FailFast()]
Unit = Literal["channels", "kv_groups", "query_heads", "experts"]


class Block(NamedTuple):
    """One block of a decoder."""

    kind: Literal["attention", "MLP"]
    layer: int


class _Operation(Record):
    """What every operation says about itself.

    Attributes:
        kind: Of the plans that may hold it.
        layers_removed: Number of layers removed.
    """

    kind: ClassVar[Literal["depth", "width"]]

    @property
    def layers_removed(self) -> int:
        """Number of layers removed."""
        return 0

    def used(self) -> Iterator[Block]:
        """The blocks that no other operation of the plan may use."""
        raise NotImplementedError

    def check(self, before: Dimensions) -> None:
        """Check that the operation names existing layers and units, each once.

        Raises:
            PlanError: It does not; ``option`` is the field, where one field is wrong.
        """
        raise NotImplementedError

    def describe(self) -> str:
        """What it does, for a table of operations; the layers are in another column."""
        raise NotImplementedError


class _LayerOperation(_Operation):
    """An operation that removes blocks."""

    kind: ClassVar[Literal["depth", "width"]] = "depth"

    def removed(self) -> Iterator[Block]:
        """The blocks that the model does not have afterwards."""
        return self.used()

    @property
    def merged(self) -> tuple[int, int] | None:
        """Lowest and highest layer of those that become one new layer."""
        return None


class _Merge(_LayerOperation):
    """Consecutive layers first..last become one, at the position of the first."""

    @property
    def merged(self) -> tuple[int, int]:
        """Lowest and highest of the layers."""
        raise NotImplementedError

    @property
    def layers_removed(self) -> int:
        """Number of layers removed."""
        first, last = self.merged
        return last - first

    def used(self) -> Iterator[Block]:
        """Both blocks of every layer."""
        first, last = self.merged
        return _both(range(first, last + 1))

    def removed(self) -> Iterator[Block]:
        """All blocks but the lowest attention and the highest MLP, whose places the layer takes."""
        first, last = self.merged
        kept = (Block("attention", first), Block("MLP", last))
        return (block for block in self.used() if block not in kept)

    def check(self, before: Dimensions) -> None:
        """Check that the layers exist."""
        _check_indices("", "layer", self.merged, before.layers)


class MergeLayers(_Merge):
    """Merge layers first..last (inclusive) into one, at the position of the first.

    With ``weights_only``, biases and query and key norms are the first layer's.
    """

    op: Literal["merge_layers"] = "merge_layers"
    first: Index
    last: Index
    rule: str = "telescoped"
    weights_only: bool = False

    @property
    def merged(self) -> tuple[int, int]:
        """Lowest and highest of the layers."""
        return self.first, self.last

    @model_validator(mode="after")
    def _a_run(self) -> Self:
        if self.last <= self.first:
            raise ValueError(f"last ({self.last}) must lie above first ({self.first})")
        return self

    def check(self, before: Dimensions) -> None:
        """Check that the layers exist and that the rule is one for so many."""
        super().check(before)
        try:
            check_planned_rule(self.rule, self.last - self.first + 1)
        except PlanError as error:
            raise PlanError(error.message, hint=error.hint, option="rule") from error

    def describe(self) -> str:
        """The rule."""
        return f"merge, rule {self.rule}"


class LayerPart(Record):
    """The part of one layer in a concatenated layer.

    Attributes:
        layer: The layer.
        channels: MLP channels (rows of gate and up, columns of down) of the part; may be empty.
        kv_groups: Key/value heads of the part, each with the query heads that read it.
        norm_share: Its share in the mean of the layers' norms.
        bias_share: Its share in the sum of the biases of o_proj and down_proj.
    """

    layer: Index
    channels: Annotated[tuple[Index, ...], FailFast()]
    kv_groups: Annotated[tuple[Index, ...], FailFast()]
    norm_share: Share = 1
    bias_share: Share = 1


class ConcatLayers(_Merge):
    """Concatenate channels and heads of consecutive layers to one layer of the same shape.

    The channels and the KV groups of the parts add up to those of one layer, in the order of the
    parts. The layer takes the position of the lowest one.
    """

    op: Literal["concat_layers"] = "concat_layers"
    parts: Annotated[tuple[LayerPart, ...], Field(min_length=2), FailFast()]

    @property
    def first(self) -> int:
        """Lowest layer of the parts."""
        return self.parts[0].layer

    @property
    def last(self) -> int:
        """Highest layer of the parts."""
        return self.parts[-1].layer

    @property
    def merged(self) -> tuple[int, int]:
        """Lowest and highest of the layers."""
        return self.first, self.last

    @model_validator(mode="after")
    def _consecutive(self) -> Self:
        layers = [part.layer for part in self.parts]
        if layers != [layers[0] + number for number in range(len(layers))]:
            raise ValueError("the parts must come from consecutive layers, lowest first")
        return self

    def describe(self) -> str:
        """The number of units of each part."""
        channels = "+".join(f"{len(part.channels):,}" for part in self.parts)
        groups = "+".join(str(len(part.kv_groups)) for part in self.parts)
        return f"concatenate, {channels} MLP channels, {groups} KV groups"


class DropLayers(_LayerOperation):
    """Drop whole layers."""

    op: Literal["drop_layers"] = "drop_layers"
    indices: Indices

    @property
    def layers_removed(self) -> int:
        """Number of layers removed."""
        return len(self.indices)

    def used(self) -> Iterator[Block]:
        """Both blocks of every layer."""
        return _both(self.indices)

    def check(self, before: Dimensions) -> None:
        """Check that the layers exist."""
        _check_indices("indices", "layer", self.indices, before.layers)

    def describe(self) -> str:
        """That it drops."""
        return "drop"


class DropSublayers(_LayerOperation):
    """Drop attention blocks and as many MLP blocks, each with its norm.

    Each remaining attention forms a layer with the MLP after it. A plan after which blocks do not
    alternate cannot be applied.
    """

    op: Literal["drop_sublayers"] = "drop_sublayers"
    attention: Indices
    mlp: Indices

    @property
    def layers_removed(self) -> int:
        """Number of layers removed."""
        return len(self.attention)

    @model_validator(mode="after")
    def _as_many(self) -> Self:
        if len(self.attention) != len(self.mlp):
            raise ValueError(
                f"{len(self.attention)} attention and {len(self.mlp)} mlp blocks: as many of both "
                "must go"
            )
        return self

    def used(self) -> Iterator[Block]:
        """The blocks."""
        yield from (Block("attention", layer) for layer in self.attention)
        yield from (Block("MLP", layer) for layer in self.mlp)

    def check(self, before: Dimensions) -> None:
        """Check that the layers exist."""
        _check_indices("attention", "layer", self.attention, before.layers)
        _check_indices("mlp", "layer", self.mlp, before.layers)

    def describe(self) -> str:
        """The blocks."""
        attention, mlp = (", ".join(map(str, one)) for one in (self.attention, self.mlp))
        return f"drop attention {attention}, MLP {mlp}"


class _KeepUnits(_Operation):
    """Units inside one layer to keep.

    Every layer of a plan keeps the same number of KV groups, of query heads and of experts, or what
    it has. Only MLP channels may be more in one layer than in another.

    Attributes:
        unit: What is kept, by its name in `Dimensions.units`.
        noun: What messages call one of them.
        block: The block that has the units.
        listed: The field that lists those to keep.
    """

    kind: ClassVar[Literal["depth", "width"]] = "width"
    unit: ClassVar[Unit]
    noun: ClassVar[str]
    block: ClassVar[Literal["attention", "MLP"]]
    listed: ClassVar[str]
    # First, so that plan files keep the order of their keys.
    op: str
    layer: Index

    @property
    def kept(self) -> tuple[int, ...]:
        """Indices of the units to keep."""
        kept: tuple[int, ...] = getattr(self, self.listed)
        return kept

    def used(self) -> Iterator[Block]:
        """The block of the units."""
        yield Block(self.block, self.layer)

    def check(self, before: Dimensions) -> None:
        """Check that the layer and the units exist."""
        _check_indices("layer", "layer", [self.layer], before.layers)
        if self.unit not in before.units:
            raise PlanError(f"no {self.noun} of {before.architecture} can be removed alone")
        units = before.of_layer(self.layer).units[self.unit]
        _check_indices(self.listed, self.noun, self.kept, units)

    def describe(self) -> str:
        """The number of units."""
        return f"keep {len(self.kept):,} {self.unit}"


class KeepChannels(_KeepUnits):
    """MLP channels (rows of gate and up, columns of down) to keep in one layer."""

    unit: ClassVar[Unit] = "channels"
    noun: ClassVar[str] = "channel"
    block: ClassVar[Literal["attention", "MLP"]] = "MLP"
    listed: ClassVar[str] = "indices"
    op: Literal["keep_channels"] = "keep_channels"
    indices: Indices


class KeepHeads(_KeepUnits):
    """Key/value heads to keep in one layer, each with the query heads that read it."""

    unit: ClassVar[Unit] = "kv_groups"
    noun: ClassVar[str] = "KV group"
    block: ClassVar[Literal["attention", "MLP"]] = "attention"
    listed: ClassVar[str] = "kv_groups"
    op: Literal["keep_heads"] = "keep_heads"
    kv_groups: Indices


class KeepQueryHeads(_KeepUnits):
    """Query heads to keep in one layer, as many of every KV group; all key/value heads stay."""

    unit: ClassVar[Unit] = "query_heads"
    noun: ClassVar[str] = "query head"
    block: ClassVar[Literal["attention", "MLP"]] = "attention"
    listed: ClassVar[str] = "query_heads"
    op: Literal["keep_query_heads"] = "keep_query_heads"
    query_heads: Indices

    def check(self, before: Dimensions) -> None:
        """Check that the layer and the heads exist, and that every KV group keeps as many."""
        super().check(before)
        kept = Counter(head // before.queries_per_group for head in self.query_heads)
        if len(kept) < before.kv_heads or len({*kept.values()}) > 1:
            groups = range(before.kv_heads)
            most, least = (best(groups, key=kept.__getitem__) for best in (max, min))
            raise PlanError(
                f"keeps query heads of KV groups unequally: {kept[most]} of group {most}, "
                f"{kept[least]} of group {least}",
                hint="keep the same number of every KV group: no model runs otherwise",
                option="query_heads",
            )


class KeepExperts(_KeepUnits):
    """Experts to keep in one layer, each with its row of the router."""

    unit: ClassVar[Unit] = "experts"
    noun: ClassVar[str] = "expert"
    block: ClassVar[Literal["attention", "MLP"]] = "MLP"
    listed: ClassVar[str] = "experts"
    op: Literal["keep_experts"] = "keep_experts"
    experts: Indices

    def check(self, before: Dimensions) -> None:
        """Check that the layer and the experts exist, and that the router has enough to choose."""
        super().check(before)
        if len(self.experts) < before.experts_per_token:
            raise PlanError(
                f"keeps {len(self.experts)} experts; the router chooses "
                f"{before.experts_per_token} for each token",
                hint=f"keep {before.experts_per_token} or more",
                option="experts",
            )


class _StreamOperation(_Operation):
    """An operation on the residual stream of the whole model."""

    kind: ClassVar[Literal["depth", "width"]] = "width"

    def used(self) -> Iterator[Block]:
        """No block alone: other operations may keep units of every layer."""
        yield from ()


class KeepHidden(_StreamOperation):
    """Channels of the residual stream to keep, the same in the whole model.

    With each go its column of the embedding, of the head and of all maps that read the stream, its
    row of those that write to it, and its entry of the norms.
    """

    op: Literal["keep_hidden"] = "keep_hidden"
    indices: Indices

    def check(self, before: Dimensions) -> None:
        """Check that the channels exist and can be removed."""
        if not before.stream_vectors:
            raise PlanError(f"no hidden channel of {before.architecture} can be removed")
        _check_indices("indices", "hidden channel", self.indices, before.hidden_size)

    def describe(self) -> str:
        """The number of channels."""
        return f"keep {len(self.indices):,} hidden channels"


class RotateHidden(_StreamOperation):
    """Rotate the residual stream into its principal components before channels of it go.

    The basis is no part of the plan: it follows from the model and the calibration set, which has
    to be there when the plan is applied.

    Attributes:
        calibration: What names the calibration set, as `Session.digest` does.
        per: What has a basis of its own: the whole model, or every block and the head. An operator
            of each block then changes from its basis to the next.
    """

    op: Literal["rotate_hidden"] = "rotate_hidden"
    calibration: str
    per: BasisOf = "model"

    def check(self, before: Dimensions) -> None:
        """Check that the stream of the family can be rotated."""
        if not before.stream_vectors:
            raise PlanError(f"the residual stream of {before.architecture} cannot be rotated")

    def describe(self) -> str:
        """What it does."""
        bases = ", with a basis for every block" if self.per == "block" else ""
        return f"rotate the residual stream{bases}"


DepthOperation = MergeLayers | DropLayers | ConcatLayers | DropSublayers
WidthOperation = KeepChannels | KeepHeads | KeepQueryHeads | KeepExperts
Operation = Annotated[
    DepthOperation | WidthOperation | KeepHidden | RotateHidden, Field(discriminator="op")
]


def by_kind(
    operations: Iterable[Operation],
) -> tuple[list[DepthOperation], list[WidthOperation]]:
    """The operations on layers, and those on units inside layers."""
    depth: list[DepthOperation] = []
    width: list[WidthOperation] = []
    for operation in operations:
        if isinstance(operation, WidthOperation):
            width.append(operation)
        elif not isinstance(operation, _StreamOperation):
            depth.append(operation)
    return depth, width


def _both(layers: Sequence[int]) -> Iterator[Block]:
    for layer in layers:
        yield Block("attention", layer)
        yield Block("MLP", layer)


def _check_indices(field: str, what: str, indices: Sequence[int], size: int) -> None:
    """Check that indices are different and below a size.

    Raises:
        PlanError: They are not; its ``option`` is the field.
    """
    beyond = next((index for index in indices if index >= size), None)
    if beyond is not None:
        raise PlanError(
            f"names {what} {beyond}; the model has {what}s 0 to {size - 1}", option=field
        )
    if len(set(indices)) != len(indices):
        twice, _ = Counter(indices).most_common(1)[0]
        raise PlanError(f"names {what} {twice} twice", option=field)
