"""The pruning plan: the result of a strategy, as data that can be read, edited and applied."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field, model_validator
from typing_extensions import Self

from slm_plugin.errors import PlanError
from slm_plugin.files import write_text
from slm_plugin.models.fingerprint import Fingerprint
from slm_plugin.models.view import Dimensions
from slm_plugin.record import Record
from slm_plugin.target import Target
from slm_plugin.texts import read_text, shown_path

# Largest plan file in bytes.
LARGEST = 1 << 29
# Operations that a notebook shows.
MOST_SHOWN = 40
# Beyond any model; larger numbers would not fit a tensor of indices.
MOST = 2**31 - 1
Index = Annotated[int, Field(ge=0, le=MOST)]
Share = Annotated[float, Field(ge=0, le=1)]
# Report only the first invalid entry of a long list.
Indices = Annotated[tuple[Index, ...], Field(min_length=1), FailFast()]


class MergeLayers(Record):
    """Merge layers first..last (inclusive) into one, at the position of the first.

    With ``weights_only``, biases and query and key norms are the first layer's.
    """

    op: Literal["merge_layers"] = "merge_layers"
    first: Index
    last: Index
    rule: str = "telescoped"
    weights_only: bool = False

    @property
    def layers_removed(self) -> int:
        """Number of layers removed."""
        return self.last - self.first

    @model_validator(mode="after")
    def _a_run(self) -> Self:
        if self.last <= self.first:
            raise ValueError(f"last ({self.last}) must lie above first ({self.first})")
        return self


class DropLayers(Record):
    """Drop whole layers."""

    op: Literal["drop_layers"] = "drop_layers"
    indices: Indices

    @property
    def layers_removed(self) -> int:
        """Number of layers removed."""
        return len(self.indices)


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


class ConcatLayers(Record):
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
    def layers_removed(self) -> int:
        """Number of layers removed."""
        return len(self.parts) - 1

    @model_validator(mode="after")
    def _consecutive(self) -> Self:
        layers = [part.layer for part in self.parts]
        if layers != [self.first + number for number in range(len(layers))]:
            raise ValueError("the parts must come from consecutive layers, lowest first")
        return self


class DropSublayers(Record):
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


class KeepChannels(Record):
    """MLP channels (rows of gate and up, columns of down) to keep in one layer."""

    op: Literal["keep_channels"] = "keep_channels"
    layer: Index
    indices: Indices


class KeepHeads(Record):
    """Key/value heads to keep in one layer, each with the query heads that read it."""

    op: Literal["keep_heads"] = "keep_heads"
    layer: Index
    kv_groups: Indices


LayerOperation = MergeLayers | DropLayers | ConcatLayers
DepthOperation = LayerOperation | DropSublayers
Operation = Annotated[DepthOperation | KeepChannels | KeepHeads, Field(discriminator="op")]


class Trial(Record):
    """One candidate that a depth strategy evaluated: layers merged into one, or dropped.

    ``committed`` holds the windows that were merged before the trial. The similarity is the
    criterion's mean over the calibration samples; ``samples`` is the number of evaluated samples
    after early stopping. ``layers_removed`` is the number of layers removed in the trial, if some
    windows were merged and others dropped.
    """

    first: Index
    last: Index
    rule: str | None = None
    committed: Annotated[tuple[tuple[Index, Index], ...], FailFast()] = ()
    similarity: float
    samples: int | None = None
    layers_removed: int | None = None
    accepted: bool


class UnitScores(Record):
    """Importance of every prunable unit of one layer; the lowest are removed first."""

    layer: Index
    unit: Literal["mlp_channel", "kv_group"]
    scores: Annotated[tuple[float, ...], FailFast()]


class LayerScores(Record):
    """Scores of a depth strategy for every layer, or for every block by its lowest layer.

    The lowest eligible ones are removed first.
    """

    meaning: str
    scores: Annotated[tuple[float, ...], FailFast()]


class PruningPlan(Record):
    """The result of a strategy for one model, with the scores behind it.

    Indices refer to the model that ``fingerprint`` identifies. Surgery fails unless the pruned
    model has exactly the dimensions ``after``. ``trials`` are the trials of the result, in order;
    ``explored`` are the other trials of the search.
    """

    format: Literal[1] = 1
    pruner: str
    kind: Literal["depth", "width"]
    options: dict[str, Any] = Field(default_factory=dict)
    target: Target
    fingerprint: Fingerprint
    before: Dimensions
    after: Dimensions
    operations: Annotated[tuple[Operation, ...], FailFast()]
    threshold: float | None = None
    trials: Annotated[tuple[Trial, ...], FailFast()] = ()
    explored: Annotated[tuple[Trial, ...], FailFast()] = ()
    scores: Annotated[tuple[UnitScores, ...], FailFast()] = ()
    layer_scores: LayerScores | None = None
    notes: Annotated[tuple[str, ...], FailFast()] = ()
    warnings: Annotated[tuple[str, ...], FailFast()] = ()

    @property
    def layers_removed(self) -> int:
        """Number of decoder layers that the plan removes."""
        return self.before.layers - self.after.layers

    @property
    def parameters_removed(self) -> int:
        """Number of parameters that the plan removes."""
        return self.before.parameters - self.after.parameters

    def upto(self, count: int) -> PruningPlan:
        """The plan cut to its first operations, in the order of the search.

        Raises:
            PlanError: The plan has fewer operations, or is about width, where every layer's
                operation is needed.
        """
        if self.kind != "depth":
            raise PlanError(
                f"a plan by {self.pruner} cannot be cut: all layers have one width",
                hint="plan again with a smaller target",
            )
        if count > len(self.operations):
            raise PlanError(
                f"the plan has {len(self.operations)} operations, not {count}",
                hint="`slm-plugin explain` shows them",
            )
        kept = self.operations[:count]
        gone = sum(op.layers_removed for op in kept if isinstance(op, DepthOperation))
        note = f"cut to the first {count} of {len(self.operations)} operations"
        return self.model_copy(
            update={
                "operations": kept,
                "after": self.before.without_layers(gone),
                "notes": (*self.notes, note),
            }
        )

    def __str__(self) -> str:
        sizes = (
            f"{self.before.layers} to {self.after.layers} layers",
            f"{self.before.parameters:,} to {self.after.parameters:,} parameters",
        )
        shown = [f"  {one.model_dump_json()}" for one in self.operations[:MOST_SHOWN]]
        if more := len(self.operations) - len(shown):
            shown.append(f"  and {more} more operations")
        return "\n".join([f"plan by {self.pruner}: {', '.join(sizes)}", *shown])

    def _repr_html_(self) -> str:
        """How a notebook shows it."""
        return f"<pre>{escape(str(self))}</pre>"

    def to_json(self) -> str:
        """The plan as JSON with one operation, trial or score list per line, for readable diffs."""
        fields = self.model_dump(mode="json", exclude_none=True)
        lines = []
        for name, value in fields.items():
            if isinstance(value, list) and value:
                items = ",\n".join(f"    {json.dumps(item)}" for item in value)
                lines.append(f"  {json.dumps(name)}: [\n{items}\n  ]")
            else:
                lines.append(f"  {json.dumps(name)}: {json.dumps(value)}")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def write(self, path: str | Path) -> None:
        """Write the plan atomically."""
        write_text(Path(path), self.to_json())

    @classmethod
    def read(cls, path: str | Path) -> PruningPlan:
        """Read a plan.

        Raises:
            PlanError: The file is missing, is not JSON, does not fit the schema, or contradicts
                itself.
        """
        file = Path(path)
        return cls.parse(read_text(file, "the plan", PlanError, LARGEST), origin=shown_path(file))

    @classmethod
    def parse(cls, text: str, *, origin: str = "the plan") -> PruningPlan:
        """Read a plan that is given as JSON text.

        Args:
            text: The JSON text.
            origin: Its name in messages.

        Raises:
            PlanError: It is not JSON, does not fit the schema, or contradicts itself.
        """
        from slm_plugin.plans.check import parsed

        return parsed(text, origin)
