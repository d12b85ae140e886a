"""Width surgery: slice projections in place and update the config and modules to match.

Experts are removed by `slm_plugin.surgery.experts`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from slm_plugin.lazy import torch
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.streaming import is_stub
from slm_plugin.models.view import DecoderView, projections
from slm_plugin.plans import WidthOperation
from slm_plugin.plans.stream import UNCHANGED, StreamChange
from slm_plugin.surgery.concatenation import joined
from slm_plugin.surgery.experts import remove_experts, remove_layer_experts
from slm_plugin.surgery.groups import Members, axis, members
from slm_plugin.surgery.portability import refuse_unloadable
from slm_plugin.surgery.removal import checked_removal
from slm_plugin.surgery.stream import change_stream

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PretrainedConfig, PreTrainedModel

    from slm_plugin.models.families.family import Family


def apply_channels(
    model: PreTrainedModel,
    operations: Sequence[WidthOperation],
    stream: StreamChange = UNCHANGED,
    basis: Tensor | None = None,
) -> None:
    """Apply the operations of a width plan.

    Remaining units keep their order. Everything is checked before the first weight changes. Old
    weights are freed; ``requires_grad`` and tied embeddings are unchanged.

    Args:
        model: The model, changed in place.
        operations: `KeepChannels`, `KeepHeads`, `KeepQueryHeads`, `KeepExperts`, each kind for
            every layer or for none.
        stream: What is done to the residual stream.
        basis: The basis or the bases into which it is rotated, where it is; see `change_stream`.

    Raises:
        PlanError: An operation does not fit the model, or layers would differ in more than their
            MLP channels.
        TargetError: The installed transformers could not load the result.
        MissingExtraError: Channels or heads are removed and torch-pruning is not installed.
    """
    view = DecoderView.of(model)
    removal = checked_removal(operations, view.dimensions(), stream)
    before, after = removal.before, removal.after
    refuse_unloadable(before, after)
    if stream:
        change_stream(view, stream, basis, after)
    remove_experts(view, removal.units.get("experts", ()), before, after)
    if not removal.projected:
        return
    for index, layer in enumerate(view.layers):
        chosen = removal.of_layer(index)
        chosen.pop("experts", None)
        _narrow(layer, chosen, before.of_layer(index), after.of_layer(index))
    sync_config(view.config, after)


def narrowed_copy(
    layer: nn.Module, removed: Mapping[str, Sequence[int]], before: Dimensions, after: Dimensions
) -> nn.Module:
    """A layer without some of its units; the given one is unchanged.

    Args:
        layer: The layer.
        removed: The units to remove, by the name of their kind.
        before: Dimensions of the model.
        after: Dimensions without the units.
    """
    made = copy.deepcopy(layer)
    units = dict(removed)
    remove_layer_experts(made, units.pop("experts", ()), before, after)
    if not units:
        return made
    _narrow(made, units, before, after)
    # Phi-3 reads the number of heads from the config when it runs.
    for config in {id(m.config): m.config for m in made.modules() if hasattr(m, "config")}.values():
        sync_config(cast("PretrainedConfig", config), after)
    return made


def _narrow(
    layer: nn.Module, removed: Mapping[str, Sequence[int]], before: Dimensions, after: Dimensions
) -> None:
    for unit, indices in removed.items():
        _remove(projections(layer, before.family), members(unit, indices, before))
    _sync_modules(layer, before.family, after)


def _remove(modules: Mapping[str, nn.Linear], removed: Members) -> None:
    """Remove the rows and columns of units from a layer's projections."""
    import torch_pruning

    for name, indices in removed.items():
        if not indices:
            continue
        linear = modules[name]
        if is_stub(linear.weight):
            _remove_streamed(linear, set(indices), axis(name))
            continue
        flags = {key: parameter.requires_grad for key, parameter in linear.named_parameters()}
        with torch.no_grad():
            if axis(name) == 0:
                torch_pruning.prune_linear_out_channels(linear, list(indices))
            else:
                torch_pruning.prune_linear_in_channels(linear, list(indices))
        for key, parameter in linear.named_parameters():
            parameter.requires_grad_(flags[key])


def _remove_streamed(linear: nn.Linear, removed: set[int], dim: int) -> None:
    """Remove rows or columns of weights that are read from disk when they are used."""
    kept = tuple(index for index in range(linear.weight.shape[dim]) if index not in removed)
    for name, parameter in list(linear.named_parameters(recurse=False)):
        if name == "weight" or dim == 0:
            setattr(linear, name, joined((parameter,), (kept,), dim))
    linear.out_features, linear.in_features = linear.weight.shape


def _sync_modules(layer: nn.Module, family: Family, after: Dimensions) -> None:
    """Update the sizes stored in attention and MLP modules, which depend on the release."""
    _set_existing(
        layer.get_submodule(family.attention[0]),
        num_heads=after.attention_heads,
        num_attention_heads=after.attention_heads,
        num_key_value_heads=after.kv_heads,
        num_key_value_groups=after.queries_per_group,
    )
    _set_existing(layer.get_submodule(family.mlp[0]), intermediate_size=after.intermediate_size)


def _set_existing(module: nn.Module, **sizes: int) -> None:
    for name, size in sizes.items():
        if hasattr(module, name):
            setattr(module, name, size)


def sync_config(config: PretrainedConfig, after: Dimensions) -> None:
    """Write the new sizes in place; a missing head_dim would be derived from the head count."""
    config.intermediate_size = after.intermediate_size
    config.num_attention_heads = after.attention_heads
    config.num_key_value_heads = after.kv_heads
    config.head_dim = after.head_dim
