"""The pruning plan: the result of a strategy, as data that can be read, edited and applied."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import FailFast, Field

from slm_plugin.counts import Count
from slm_plugin.errors import PlanError
from slm_plugin.files import write_text
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.fingerprint import Fingerprint
from slm_plugin.plans.losses import without_loss_after
from slm_plugin.plans.operations import Index, Operation
from slm_plugin.record import Record
from slm_plugin.target import Target
from slm_plugin.texts import read_text, shown_path

# What the operations are on: layers, what is inside layers, or first the one and then the other.
PlanKind = Literal["depth", "width", "hybrid"]
# What is measured or predicted; JSON reads 1e999 as infinity.
Finite = Annotated[float, Field(allow_inf_nan=False)]
# Largest plan file in bytes.
LARGEST = 1 << 29
# Operations that a notebook shows.
MOST_SHOWN = 40


class Trial(Record):
    """One candidate that a depth strategy evaluated: layers merged into one, or dropped.

    ``committed`` holds the windows that were merged before the trial. The similarity is the
    criterion's mean over the calibration samples, or over those that no repair is fitted to, where
    the search repairs; ``samples`` is the number of evaluated samples after early stopping.
    ``layers_removed`` is the number of layers removed in the trial, if some windows were merged and
    others dropped.
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
    """Importance of every prunable unit of one layer; the lowest are removed first.

    Of query heads, the lowest of every KV group are.
    """

    layer: Index
    unit: Literal["mlp_channel", "kv_group", "query_head", "expert"]
    scores: Annotated[tuple[float, ...], FailFast()]


class LayerScores(Record):
    """Scores of a depth strategy for every layer, or for every block by its lowest layer.

    The lowest eligible ones are removed first.
    """

    meaning: str
    scores: Annotated[tuple[float, ...], FailFast()]


class FrontierShape(Record):
    """A shape that a planner of depth and width considered.

    ``cost`` is its share of what the model costs, in what the target counts. ``predicted`` and
    ``measured`` are KL(model before the plan || pruned and restored model) in nats a token;
    ``measured`` on held-out samples, for the shapes that were tried. ``widths`` has the MLP
    channels of every layer of the model, 0 for a removed one, where each has its own; ``mlp_width``
    is the largest then.
    """

    layers: Count
    mlp_width: Count
    kv_groups: Count
    parameters: Annotated[int, Field(ge=1)]
    cost: Annotated[Finite, Field(gt=0)]
    predicted: Finite
    measured: Finite | None = None
    chosen: bool = False
    widths: tuple[Index, ...] | None = None

    @property
    def width_range(self) -> str:
        """MLP channels of a layer in words: one number, or the smallest and the largest."""
        least = min((width for width in self.widths or () if width), default=self.mlp_width)
        return f"{least:,} to {self.mlp_width:,}" if least < self.mlp_width else f"{least:,}"


class PruningPlan(Record):
    """The result of a strategy for one model, with the scores behind it.

    Indices refer to the model that ``fingerprint`` identifies. The operations of a hybrid plan on
    layers come first; those on units name a layer by the lowest layer in it. Surgery fails unless
    the pruned model has exactly the dimensions ``after``. ``trials`` are the trials of the result,
    in order; ``explored`` are the other trials of the search. ``hidden_scores`` rank the channels
    of the residual stream, where some are removed; the lowest are removed first. ``frontier``
    has the shapes among which the planner `hybrid` chose, and ``adherence`` what was asked to go
    against what goes, the smaller over the larger. ``followed_by`` is the recovery stage that a
    recipe runs right after the plan. ``loss_before`` and ``loss_after``
    are the mean next-token cross-entropy of the model and of the pruned one, before any recovery,
    in nats a token over the calibration set; None where that was not measured.
    """

    format: Literal[1] = 1
    pruner: str
    kind: PlanKind
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
    hidden_scores: tuple[float, ...] | None = None
    layer_scores: LayerScores | None = None
    frontier: Annotated[tuple[FrontierShape, ...], FailFast()] = ()
    adherence: Annotated[float, Field(ge=0, le=1)] | None = None
    followed_by: dict[str, Any] | None = None
    loss_before: Annotated[Finite, Field(ge=0)] | None = None
    loss_after: Annotated[Finite, Field(ge=0)] | None = None
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

        A hybrid plan is cut to some of its operations on layers, and is a depth plan then.

        Raises:
            PlanError: The plan has fewer operations, or the cut is among those on units, where
                every layer's operation is needed.
        """
        if self.kind == "width":
            raise PlanError(
                f"a plan by {self.pruner} cannot be cut: it is one choice for all layers",
                hint="plan again with a smaller target",
            )
        if count > (there := len(self.operations)):
            raise PlanError(
                f"the plan has {there} operation{'' if there == 1 else 's'}, not {count}",
                hint="`slm-plugin explain` shows them",
            )
        if self.kind == "hybrid":
            return self._hybrid_upto(count)
        return self._depth_upto(count)

    def _hybrid_upto(self, count: int) -> PruningPlan:
        if count == len(self.operations):
            return self
        depth = sum(operation.kind == "depth" for operation in self.operations)
        if count > depth:
            raise PlanError(
                f"a hybrid plan cannot be cut after operation {count}: from operation {depth + 1} "
                "on it is one choice for all layers",
                hint=f"give at most {depth}, or {len(self.operations)} for all operations",
            )
        narrower = {"kind": "depth", "scores": (), "hidden_scores": None}
        return self._depth_upto(count).model_copy(update=narrower)

    def _depth_upto(self, count: int) -> PruningPlan:
        kept = self.operations[:count]
        removed = sum(op.layers_removed for op in kept)
        note = f"cut to the first {count} of {len(self.operations)} operations"
        whole = count == len(self.operations)
        made = self if whole else without_loss_after(self)
        return made.model_copy(
            update={
                "operations": kept,
                "after": self.before.without_layers(removed),
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
