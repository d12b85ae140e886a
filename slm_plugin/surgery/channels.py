"""Width surgery: slice projections in place and keep config and modules in step."""

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
    """Carry out the operations of a width plan.

    Units that stay keep their order. Everything is checked before the first weight changes. Old
    weights become free; ``requires_grad`` and tied embeddings stay as they are.

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
    """MLP channels and KV groups that go, for every layer."""
    channels: list[tuple[int, tuple[int, ...]]] = []
    groups: list[tuple[int, tuple[int, ...]]] = []
    for operation in operations:
        if isinstance(operation, KeepChannels):
            channels.append((operation.layer, operation.indices))
        elif isinstance(operation, KeepHeads):
            groups.append((operation.layer, operation.kv_groups))
        else:
            raise PlanError(f"width surgery cannot carry out {operation.op}")
    return (
        _complements("keep_channels", channels, before.layers, before.intermediate_size),
        _complements("keep_heads", groups, before.layers, before.kv_heads),
    )


def _complements(
    name: str, kept: list[tuple[int, tuple[int, ...]]], layers: int, size: int
) -> Removed:
    """What the layers lose, when all of them keep the same number of units."""
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
    """Slice a unit's rows and columns out of a layer's projections."""
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
    """Sizes that attention and MLP modules remember; which ones depends on the release.

    Whole groups go, so the query heads per key/value head stay as many.
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
    """Say what is there now; an unwritten head_dim would be derived from the head count."""
    config.intermediate_size = after.intermediate_size
    config.num_attention_heads = after.attention_heads
    config.num_key_value_heads = after.kv_heads
    config.head_dim = after.head_dim
