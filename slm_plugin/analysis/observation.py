"""What one batch shows: the residual stream between all layers, and what each block adds to it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from slm_plugin.calibration.captures import Batch, run_layers
from slm_plugin.lazy import inference_mode, torch
from slm_plugin.models.view import DecoderView

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Observation:
    """One batch, on the CPU.

    Attributes:
        states: Embedding and output of every layer, before the final norm, each
            ``(samples, length, hidden)``: one more than there are layers.
        attention: Norms of what every attention block adds, ``(layers, tokens)``, in float64.
        mlp: Norms of what every MLP adds, ``(layers, tokens)``, in float64.
    """

    states: tuple[Tensor, ...]
    attention: Tensor
    mlp: Tensor


@inference_mode
def observe(view: DecoderView, batch: Batch) -> Observation:
    """Send every layer's captured input through it again, and watch its two blocks.

    Figures are taken on the CPU: not every accelerator has float64.
    """
    states: list[Tensor] = []
    norms: list[list[Tensor]] = []
    output = batch.inputs[0]
    for index, layer in enumerate(view.layers):
        states.append(batch.inputs[index].cpu())
        with _watched(layer, view.family.writers) as seen:
            output = run_layers([layer], batch.inputs[index], batch.arguments[index])
        norms.append([token_norms(seen[block]) for block in view.family.writers])
    states.append(output.cpu())
    attention, mlp = torch.stack([torch.stack(layer) for layer in norms], dim=1)
    scale = view.residual_multiplier
    return Observation(tuple(states), attention * scale, mlp * scale)


def token_norms(states: Tensor) -> Tensor:
    """Euclidean norm of every token's vector.

    Args:
        states: ``(samples, length, hidden)``.

    Returns:
        ``(tokens,)``, in float64 on the CPU.
    """
    norms: Tensor = torch.linalg.vector_norm(states.cpu().double(), dim=-1)
    return norms.flatten()


@contextmanager
def _watched(layer: nn.Module, blocks: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Give the outputs of modules of a layer, by their names."""
    seen: dict[str, Tensor] = {}

    def keep(block: str, _module: nn.Module, _args: Any, output: Any) -> None:
        # A copy: Falcon adds to what its MLP puts out in place.
        seen[block] = (output[0] if isinstance(output, tuple) else output).clone()

    hooks = [
        layer.get_submodule(block).register_forward_hook(partial(keep, block)) for block in blocks
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
