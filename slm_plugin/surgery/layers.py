"""Apply depth operations: merge or drop decoder layers, and update indices and config."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slm_plugin.lazy import nn
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.view import DecoderView, layer_lists
from slm_plugin.plans import ConcatLayers, DepthOperation, MergeLayers
from slm_plugin.plans.layout import check_even, check_fixed, layers_left
from slm_plugin.surgery.composition import composed_layer
from slm_plugin.surgery.concatenation import concatenated_layer
from slm_plugin.surgery.merge_rules import merged_layer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

    from slm_plugin.models.families.family import Family


def apply_layers(
    model: PreTrainedModel, operations: Sequence[DepthOperation], stack: str | None = None
) -> list[tuple[int, int]]:
    """Merge, concatenate and drop layers in place.

    A merged layer takes the position and the attention type of its lowest layer. Layer indices,
    the number of layers and all per-layer lists of the config are updated, so that the KV cache
    and a reload with stock classes work.

    Args:
        model: The model.
        operations: What is done to its layers.
        stack: Which of its two stacks, where it has two.

    Returns:
        For every remaining layer, the lowest and the highest original layer in it.

    Raises:
        PlanError: Operations overlap, name layers or units that the model does not have, or leave
            blocks that do not alternate, or touch layers that must stay where they are, or the
            layers differ in width.
    """
    view = DecoderView.of(model, stack)
    dimensions = view.dimensions()
    kept = layers_left(operations, len(view.layers))
    check_fixed(operations, dimensions)
    check_even(dimensions)
    merges = {op.merged: op for op in operations if op.merged is not None}
    result = [
        made_layer(merges.get(pair), list(view.layers)[pair[0] : pair[1] + 1], dimensions)
        for pair in kept
    ]
    cut_config(view.config, view.family, [first for first, _ in kept])
    _cut_alignment(view, [first for first, _ in kept])
    for position, layer in enumerate(result):
        _renumber(layer, position)
    view.put_layers(nn.ModuleList(result))
    return kept


def made_layer(
    operation: DepthOperation | None, run: Sequence[nn.Module], dimensions: Dimensions
) -> nn.Module:
    """The layer that takes the place of a run of layers, which are unchanged.

    Args:
        operation: The merge. Without one, the lowest attention and the highest MLP remain.
        run: The layers, lowest first; a single one is returned as it is.
        dimensions: Sizes of the decoder.

    Raises:
        PlanError: The operation does not fit the layers.
    """
    family = dimensions.family
    if isinstance(operation, ConcatLayers):
        return concatenated_layer(operation.parts, run, dimensions)
    if isinstance(operation, MergeLayers):
        return merged_layer(operation.rule, run, family, weights_only=operation.weights_only)
    return run[0] if len(run) == 1 else composed_layer(run[0], run[-1], family)


def cut_config(config: PretrainedConfig, family: Family, kept: Sequence[int]) -> None:
    """Reduce the number of layers, and every per-layer list of a decoder's config, in place."""
    for name, values in list(layer_lists(config)):
        setattr(config, name, [values[index] for index in kept])
    setattr(config, family.own_name("num_hidden_layers"), len(kept))
    if family.stack != "decoder":
        # Whisper has it beside `encoder_layers`, in one release as a second number.
        config.num_hidden_layers = len(kept)
    # Qwen: the first layer with a sliding window; it must not exceed the number of layers.
    top = getattr(config, "max_window_layers", None)
    if top is not None:
        config.max_window_layers = sum(1 for index in kept if index < top)


def _cut_alignment(view: DecoderView, kept: Sequence[int]) -> None:
    """Reduce Whisper's list of layers and heads whose cross-attention tells the time of words."""
    generation: Any = getattr(view.model, "generation_config", None)
    heads = getattr(generation, "alignment_heads", None)
    if heads and view.family.stack == "decoder":
        places = {former: now for now, former in enumerate(kept)}
        left = [[places[layer], head] for layer, head in heads if layer in places]
        generation.alignment_heads = left or None


def _renumber(layer: nn.Module, position: int) -> None:
    """Update a layer's index in all its modules; the KV cache uses it."""
    for module in layer.modules():
        if hasattr(module, "layer_idx"):
            module.__dict__["layer_idx"] = position
