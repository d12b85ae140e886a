"""The calibration loss of a planned model, before surgery changes the model.

Only the layers above the lowest change run again, and one changed layer is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from slm_plugin.calibration.captures import Batch, run_batches
from slm_plugin.extras import missing
from slm_plugin.lazy import inference_mode, torch
from slm_plugin.models.head import next_token_losses
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import DepthOperation, Operation, PruningPlan
from slm_plugin.plans.layout import layers_left
from slm_plugin.plans.operations import by_kind
from slm_plugin.plans.steps import renumbered
from slm_plugin.plans.stream import stream_change
from slm_plugin.surgery.channels import narrowed_copy
from slm_plugin.surgery.layers import made_layer
from slm_plugin.surgery.removal import Removal, removal_behind

if TYPE_CHECKING:
    from torch import Tensor, nn


class Losses(NamedTuple):
    """Mean next-token cross-entropy over a calibration set, in nats a token.

    Attributes:
        before: Of the model.
        after: Of the model that a plan would make.
    """

    before: float
    after: float


@dataclass(frozen=True, slots=True)
class PlannedLayers:
    """The layers that a plan would leave, made from those of the model, which do not change.

    Attributes:
        view: The model.
        merges: The merges of the plan by the lowest and the highest layer of each.
        left: For every layer left, the layers that its attention and its MLP come from.
        removal: The units that are removed from the layers left.
    """

    view: DecoderView
    merges: dict[tuple[int, int], DepthOperation]
    left: Sequence[tuple[int, int]]
    removal: Removal

    @property
    def lowest(self) -> int:
        """The lowest layer that is changed; below it all states are those of the model."""
        changed = (
            place
            for place, pair in enumerate(self.left)
            if pair != (place, place) or self.removal.of_layer(place)
        )
        return next(changed, len(self.left))

    def made(self, start: int) -> Iterator[tuple[int, nn.Module]]:
        """The layers from a place on, each with the layer whose mask it takes."""
        layers, dimensions = list(self.view.layers), self.view.dimensions()
        before, after = self.removal.before, self.removal.after
        for place in range(start, len(self.left)):
            first, last = pair = self.left[place]
            layer = made_layer(self.merges.get(pair), layers[first : last + 1], dimensions)
            removed = self.removal.of_layer(place)
            if removed:
                layer = narrowed_copy(layer, removed, before.of_layer(place), after.of_layer(place))
            yield first, layer


@inference_mode
def calibration_losses(
    view: DecoderView, plan: PruningPlan, batches: Sequence[Batch]
) -> Losses | None:
    """The calibration loss of a model and of what a plan would make of it.

    Args:
        view: The model, which is not changed.
        plan: A plan for it.
        batches: The calibration set, with the inputs of all layers or of the first one.

    Returns:
        None where there is no loss to measure: the model has no language-modelling head, or no
        sample has two tokens; and where the planned model cannot run without changing this one:
        an operation on the residual stream changes every weight, and width surgery needs
        torch-pruning.

    Raises:
        PlanError: The operations do not fit the model.
    """
    if not _has_loss(view, batches) or stream_change(plan.operations):
        return None
    narrowed = any(one.unit != "experts" for one in by_kind(plan.operations)[1])
    if narrowed and missing("width"):
        return None
    planned = planned_layers(view, plan.operations)
    start = planned.lowest
    states = _inputs(view, batches, start)
    dense = [batch.final for batch in batches]
    if len(batches[0].inputs) <= len(view.layers):
        whole = run_batches(list(enumerate(view.layers))[start:], batches, states)
        dense = [view.norm(hidden) for hidden in whole]
    before = _mean_loss(view, batches, dense)
    states = run_batches(planned.made(start), batches, states)
    return Losses(before, _mean_loss(view, batches, [view.norm(hidden) for hidden in states]))


def _has_loss(view: DecoderView, batches: Sequence[Batch]) -> bool:
    """Whether the model has a head, and the samples have a next token."""
    if view.family.by_tensors or view.model.get_output_embeddings() is None:
        return False
    return any(batch.tokens.shape[1] > 1 for batch in batches)


def planned_layers(view: DecoderView, operations: Sequence[Operation]) -> PlannedLayers:
    """The layers that operations on layers, in layers, or both would leave.

    Args:
        view: The model, whose layers the operations name.
        operations: None of them on the residual stream.

    Raises:
        PlanError: The operations do not fit the model.
        MissingExtraError: Channels or heads are removed and torch-pruning is not installed.
    """
    dimensions = view.dimensions()
    depth, _ = by_kind(operations)
    inside = [operation for operation in operations if operation.kind == "width"]
    width = by_kind(renumbered(inside, depth, dimensions))[1]
    left = layers_left(depth, dimensions.layers)
    return PlannedLayers(
        view=view,
        merges={one.merged: one for one in depth if one.merged is not None},
        left=left,
        removal=removal_behind(depth, width, dimensions),
    )


def _inputs(view: DecoderView, batches: Sequence[Batch], index: int) -> list[Tensor]:
    """The input of one layer for every batch: captured, or from the first layer's."""
    start = min(index, len(batches[0].inputs) - 1)
    states = [batch.inputs[start] for batch in batches]
    return run_batches(list(enumerate(view.layers))[start:index], batches, states)


def _mean_loss(view: DecoderView, batches: Sequence[Batch], final: Sequence[Tensor]) -> float:
    """Mean over all tokens, from the states behind the final norm."""
    losses = [
        next_token_losses(view.logits, hidden, batch.tokens).flatten()
        for batch, hidden in zip(batches, final, strict=True)
    ]
    return float(torch.cat(losses).mean())
