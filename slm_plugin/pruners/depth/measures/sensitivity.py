"""Sensitivity: how much the units of a layer contribute to its output."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from slm_plugin.lazy import inference_mode, torch
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.streaming import values
from slm_plugin.models.view import projections

if TYPE_CHECKING:
    from torch import Tensor, nn


@inference_mode
def sensitivities(
    layer: nn.Module, run: Callable[[], object], dimensions: Dimensions
) -> tuple[Tensor, Tensor]:
    """Sensitivity of a layer's MLP channels and KV groups.

    For a channel it is the mean absolute activation times the sum of the absolute weights that read
    it. For a group it is the mean of the same over the columns of o_proj that read its query heads.

    Args:
        layer: The layer.
        run: Runs the layer on the calibration set.
        dimensions: Dimensions of the model.

    Returns:
        ``(channels,)`` and ``(kv groups,)``, in float64 on the CPU.

    Source: CoMe (arXiv 2510.15304), channel sensitivity.
    """
    modules = projections(layer, dimensions.family)
    readers = [modules[name] for name in ("down_proj", "o_proj")]
    totals = [torch.zeros(linear.in_features, dtype=torch.float64) for linear in readers]
    tokens = [0, 0]

    def counting_hook(place: int) -> Callable[..., None]:
        def hook(_linear: nn.Module, given: tuple[Tensor, ...]) -> None:
            inputs = given[0].flatten(0, -2).double().abs()
            totals[place] += inputs.sum(0).cpu()
            tokens[place] += len(inputs)

        return hook

    hooks = [linear.register_forward_pre_hook(counting_hook(i)) for i, linear in enumerate(readers)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    channels, columns = (
        total / count * values(linear.weight).double().abs().sum(0).cpu()
        for total, count, linear in zip(totals, tokens, readers, strict=True)
    )
    # The query heads of a group are adjacent: head h reads KV group h // queries per group.
    return channels, columns.view(dimensions.kv_heads, -1).mean(-1)
