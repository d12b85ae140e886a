"""Apply depth operations: merge or drop decoder layers, and update indices and config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_plugin.errors import PlanError
from slm_plugin.lazy import nn
from slm_plugin.models.view import DecoderView, layer_lists
from slm_plugin.plans import (
    ConcatLayers,
    DepthOperation,
    DropLayers,
    DropSublayers,
    LayerOperation,
    MergeLayers,
)
from slm_plugin.surgery.composition import composed_layer, pairs_left
from slm_plugin.surgery.concatenation import concatenated_layer
from slm_plugin.surgery.merge_rules import merged_layer

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def apply_layers(
    model: PreTrainedModel, operations: Sequence[DepthOperation]
) -> list[tuple[int, int]]:
    """Merge, concatenate and drop layers in place.

    A merged layer takes the position and the attention type of its lowest layer. Layer indices,
    ``num_hidden_layers`` and all per-layer lists of the config are updated, so that the KV cache
    and a reload with stock classes work.

    Returns:
        For every remaining layer, the lowest and the highest original layer in it.

    Raises:
        PlanError: Operations overlap, name layers or units that the model does not have, or leave
            blocks that do not alternate.
    """
    view = DecoderView.of(model)
    blocks = [operation for operation in operations if isinstance(operation, DropSublayers)]
    whole = [operation for operation in operations if not isinstance(operation, DropSublayers)]
    if blocks and whole:
        raise PlanError(
            "the plan mixes operations on blocks and on whole layers",
            hint="make it two plans, one per stage",
        )
    kept, result = _composed(view, blocks) if blocks else _layers_left(view, whole)
    if not result:
        raise PlanError("the plan removes every layer of the model")
    _cut_config(view, [first for first, _ in kept])
    for position, layer in enumerate(result):
        _renumber(layer, position)
    view.decoder.layers = nn.ModuleList(result)
    return kept


def _layers_left(
    view: DecoderView, operations: Sequence[LayerOperation]
) -> tuple[list[tuple[int, int]], list[nn.Module]]:
    """The layers of the result, and the original layers of each."""
    layers = list(view.layers)
    replaced = _replacements(operations, len(layers))
    kept: list[tuple[int, int]] = []
    result: list[nn.Module] = []
    for index, layer in enumerate(layers):
        operation = replaced.get(index)
        if operation is None:
            result.append(layer)
            kept.append((index, index))
        elif isinstance(operation, DropLayers) or index != operation.first:
            continue
        else:
            run = layers[operation.first : operation.last + 1]
            result.append(_made_of(operation, run, view))
            kept.append((operation.first, operation.last))
    return kept, result


def _composed(
    view: DecoderView, operations: Sequence[DropSublayers]
) -> tuple[list[tuple[int, int]], list[nn.Module]]:
    """The same for dropped attention and MLP blocks; a layer keeps its attention type."""
    layers = list(view.layers)
    pairs = pairs_left(operations, len(layers))
    result = [layers[a] if a == m else composed_layer(layers[a], layers[m]) for a, m in pairs]
    return pairs, result


def _made_of(
    operation: MergeLayers | ConcatLayers, run: Sequence[nn.Module], view: DecoderView
) -> nn.Module:
    """The merged layer of a run."""
    if isinstance(operation, ConcatLayers):
        return concatenated_layer(operation.parts, run, view.dimensions())
    return merged_layer(operation.rule, run, weights_only=operation.weights_only)


def _replacements(operations: Sequence[LayerOperation], count: int) -> dict[int, LayerOperation]:
    """The operation on each layer, by index."""
    replaced: dict[int, LayerOperation] = {}
    for operation in operations:
        if isinstance(operation, DropLayers):
            indices: Sequence[int] = operation.indices
        else:
            indices = range(operation.first, operation.last + 1)
        for index in indices:
            if index >= count:
                raise PlanError(f"the plan names layer {index}; the model has {count} layers")
            if index in replaced:
                raise PlanError(f"two operations of the plan use layer {index}")
            replaced[index] = operation
    return replaced


def _cut_config(view: DecoderView, kept: Sequence[int]) -> None:
    """Reduce every per-layer list of the config to the kept layers."""
    for name, values in list(layer_lists(view.config)):
        setattr(view.config, name, [values[index] for index in kept])
    view.config.num_hidden_layers = len(kept)
    # Qwen: the first layer with a sliding window; it must not exceed the number of layers.
    top = getattr(view.config, "max_window_layers", None)
    if top is not None:
        view.config.max_window_layers = sum(1 for index in kept if index < top)


def _renumber(layer: nn.Module, position: int) -> None:
    """Update a layer's index in all its modules; the KV cache uses it."""
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.__dict__["layer_idx"] = position
