"""Sensitivity: how much the units inside a layer add to what it gives out."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from slm_plugin.lazy import inference_mode, torch
from slm_plugin.models.streaming import values
from slm_plugin.models.view import Dimensions, projections

if TYPE_CHECKING:
    from torch import Tensor, nn


@inference_mode
def sensitivities(
    layer: nn.Module, run: Callable[[], object], dimensions: Dimensions
) -> tuple[Tensor, Tensor]:
    """How much a layer's MLP channels and KV groups add to its output.

    A channel's is its mean absolute activation times the absolute weights that read it. A group's
    is the mean of the same over all columns of o_proj that its query heads write.

    Args:
        layer: The layer.
        run: Sends the calibration set through it.
        dimensions: Its sizes.

    Returns:
        ``(channels,)`` and ``(kv groups,)``, in float64 on the CPU.

    Source: CoMe (arXiv 2510.15304), channel sensitivity.
    """
    readers = [projections(layer)[name] for name in ("down_proj", "o_proj")]
    totals = [torch.zeros(linear.in_features, dtype=torch.float64) for linear in readers]
    tokens = [0, 0]

    def listen(place: int) -> Callable[..., None]:
        def hear(_linear: nn.Module, given: tuple[Tensor, ...]) -> None:
            seen = given[0].flatten(0, -2).double().abs()
            totals[place] += seen.sum(0).cpu()
            tokens[place] += len(seen)

        return hear

    hooks = [linear.register_forward_pre_hook(listen(i)) for i, linear in enumerate(readers)]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    channels, columns = (
        total / count * values(linear.weight).double().abs().sum(0).cpu()
        for total, count, linear in zip(totals, tokens, readers, strict=True)
    )
    # The query heads of a group stand side by side: head h reads KV group h // queries per group.
    return channels, columns.view(dimensions.kv_heads, -1).mean(-1)
