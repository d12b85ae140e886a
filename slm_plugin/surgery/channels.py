"""Width surgery: slice projections in place and update the config and modules to match."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_plugin.errors import PlanError
from slm_plugin.extras import require
from slm_plugin.lazy import torch
from slm_plugin.models.view import DecoderView, Dimensions, projections
from slm_plugin.plans import KeepChannels, KeepHeads, Operation
from slm_plugin.surgery.groups import Members, axis, channel_members, kv_group_members
from slm_plugin.surgery.portability import refuse_unloadable

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

Removed = list[tuple[int, ...]]


def apply_channels(model: PreTrainedModel, operations: Sequence[Operation]) -> None:
    """Apply the operations of a width plan.

    Remaining units keep their order. Everything is checked before the first weight changes. Old
    weights are freed; ``requires_grad`` and tied embeddings are unchanged.

    Args:
        model: The model, changed in place.
        operations: `KeepChannels`, `KeepHeads` or both, each kind for every layer or for none.

    Raises:
        PlanError: An operation does not fit the model, or layers would differ in shape.
        TargetError: The installed transformers could not load the result.
        MissingExtraError: torch-pruning is not installed.
    """
    require("width", "width surgery")
    view = DecoderView.of(model)
    before = view.dimensions()
    channels, groups = _removed_units(operations, before)
    after = before.without_units(channels=len(channels[0]), kv_groups=len(groups[0]))
    refuse_unloadable(before, after)
    for layer, gone_channels, gone_groups in zip(view.layers, channels, groups, strict=True):
        _remove(layer, channel_members(gone_channels))
        _remove(layer, kv_group_members(gone_groups, before))
        _sync_modules(layer, after)
    _sync_config(view.config, after)


def _removed_units(operations: Sequence[Operation], before: Dimensions) -> tuple[Removed, Removed]:
    """MLP channels and KV groups to remove, for every layer."""
    channels: list[tuple[int, tuple[int, ...]]] = []
    groups: list[tuple[int, tuple[int, ...]]] = []
    for operation in operations:
        if isinstance(operation, KeepChannels):
            channels.append((operation.layer, operation.indices))
        elif isinstance(operation, KeepHeads):
            groups.append((operation.layer, operation.kv_groups))
        else:
            raise PlanError(f"width surgery cannot apply {operation.op}")
    return (
        _complements("keep_channels", channels, before.layers, before.intermediate_size),
        _complements("keep_heads", groups, before.layers, before.kv_heads),
    )


def _complements(
    name: str, kept: list[tuple[int, tuple[int, ...]]], layers: int, size: int
) -> Removed:
    """The units to remove; all layers must keep the same number."""
    if not kept:
        return [()] * layers
    found = Counter(layer for layer, _ in kept)
    if found != Counter(range(layers)):
        wrong = min(i for i in found.keys() | set(range(layers)) if found[i] != (i < layers))
        raise PlanError(
            f"{name} names layer {wrong} {found[wrong]} times; the model has layers 0 to "
            f"{layers - 1}",
            hint=f"give one {name} for every layer, or none",
        )
    for layer, indices in kept:
        if len(set(indices)) != len(indices) or max(indices) >= size:
            raise PlanError(
                f"{name} of layer {layer} must list different indices below {size}",
                hint="correct the indices",
            )
    counts = sorted({len(indices) for _, indices in kept})
    if len(counts) > 1:
        raise PlanError(
            f"{name} keeps {counts[0]} units in one layer and {counts[-1]} in another",
            hint="keep the same number in every layer: stock model classes have uniform layers",
        )
    return [tuple(sorted(set(range(size)) - set(indices))) for _, indices in sorted(kept)]


def _remove(layer: nn.Module, members: Members) -> None:
    """Remove the rows and columns of units from a layer's projections."""
    import torch_pruning

    modules = projections(layer)
    for name, indices in members.items():
        if not indices:
            continue
        linear = modules[name]
        flags = {key: parameter.requires_grad for key, parameter in linear.named_parameters()}
        with torch.no_grad():
            if axis(name) == 0:
                torch_pruning.prune_linear_out_channels(linear, list(indices))
            else:
                torch_pruning.prune_linear_in_channels(linear, list(indices))
        for key, parameter in linear.named_parameters():
            parameter.requires_grad_(flags[key])


def _sync_modules(layer: nn.Module, after: Dimensions) -> None:
    """Update the sizes stored in attention and MLP modules, which depend on the release.

    Only whole groups are removed, so the query heads per key/value head are unchanged.
    """
    _set_existing(
        layer.get_submodule("self_attn"),
        num_heads=after.attention_heads,
        num_attention_heads=after.attention_heads,
        num_key_value_heads=after.kv_heads,
    )
    _set_existing(layer.get_submodule("mlp"), intermediate_size=after.intermediate_size)


def _set_existing(module: nn.Module, **sizes: int) -> None:
    for name, size in sizes.items():
        if hasattr(module, name):
            setattr(module, name, size)


def _sync_config(config: PretrainedConfig, after: Dimensions) -> None:
    """Write the new sizes; a missing head_dim would be derived from the head count."""
    config.intermediate_size = after.intermediate_size
    config.num_attention_heads = after.attention_heads
    config.num_key_value_heads = after.kv_heads
    config.head_dim = after.head_dim
