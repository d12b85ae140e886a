"""Width surgery on mixtures: remove experts together with their rows of the router, in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_plugin.lazy import nn, torch
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.view import DecoderView, Experts, experts_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig

# What modules and configs call the number of experts, by release and family.
COUNTS = ("num_experts", "num_local_experts")


def remove_experts(
    view: DecoderView, removed: Sequence[Sequence[int]], before: Dimensions, after: Dimensions
) -> None:
    """Remove experts from every layer; the others keep their order, and a shared expert stays.

    Args:
        view: The model, changed in place.
        removed: For every layer, the experts to remove, ascending; as many in each.
        before: Its dimensions.
        after: Its dimensions afterwards.
    """
    if before.experts == after.experts:
        return
    for layer, gone in zip(view.layers, removed, strict=True):
        remove_layer_experts(layer, gone, before, after)
    _sync_modules(view.model, before, after)
    _sync_config(view.config, after.experts)


def remove_layer_experts(
    layer: nn.Module, removed: Sequence[int], before: Dimensions, after: Dimensions
) -> None:
    """Remove experts from one layer.

    Args:
        layer: The layer, changed in place.
        removed: The experts to remove, ascending.
        before: Dimensions of the model.
        after: Dimensions of the model without them.
    """
    found = experts_of(layer, before.family)
    if found is None or not removed:
        return
    _remove(found, removed)
    _sync_modules(layer, before, after)


def _sync_modules(whole: nn.Module, before: Dimensions, after: Dimensions) -> None:
    """Update the number that modules hold."""
    for module in whole.modules():
        for name in COUNTS:
            # Not `hasattr`: a class may give the config's value as a property.
            if vars(module).get(name) == before.experts:
                setattr(module, name, after.experts)


def _remove(found: Experts, removed: Sequence[int]) -> None:
    kept = [index for index in range(found.count) if index not in set(removed)]
    if isinstance(found.experts, nn.ModuleList):
        for index in reversed(removed):
            del found.experts[index]
    else:
        _keep_rows(found.experts, kept)
    _keep_rows(found.router, kept)
    if isinstance(found.router, nn.Linear):
        found.router.out_features = len(kept)


def _keep_rows(module: nn.Module, kept: Sequence[int]) -> None:
    """Cut the parameters of a module along axis 0; ``requires_grad`` is unchanged."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        rows = parameter.detach()[torch.tensor(kept, device=parameter.device)]
        setattr(module, name, nn.Parameter(rows, requires_grad=parameter.requires_grad))


def _sync_config(config: PretrainedConfig, experts: int) -> None:
    """Write the new number under every name that the config has."""
    for name in COUNTS:
        if hasattr(config, name):
            setattr(config, name, experts)
