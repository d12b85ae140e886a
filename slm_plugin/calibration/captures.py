"""What the layers of a model see on the calibration set: captured once, used by every strategy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from slm_plugin.calibration.spool import Spool
from slm_plugin.errors import NumericalError
from slm_plugin.models.view import DecoderView


@dataclass(frozen=True, slots=True)
class Batch:
    """Layer inputs of some samples.

    Attributes:
        tokens: Token ids, ``(samples, length)``.
        inputs: Input of every layer, each ``(samples, length, hidden)``, read from disk.
        arguments: Keyword arguments that the decoder hands to every layer: mask, positions.
        final: Hidden state behind the final norm, ``(samples, length, hidden)``.
    """

    tokens: Tensor
    inputs: Spool
    arguments: tuple[dict[str, Any], ...]
    final: Tensor


def split(tokens: Tensor, batch_tokens: int) -> Iterator[Tensor]:
    """Cut ``(samples, length)`` into batches of at most ``batch_tokens``, or one sample each."""
    yield from torch.split(tokens, max(1, batch_tokens // tokens.shape[1]))


@torch.inference_mode()
def capture(view: DecoderView, batches: Iterable[Tensor]) -> list[Batch]:
    """Run the decoder once over every batch and keep what its layers see.

    Layer inputs are taken by hooks: ``output_hidden_states`` would return the last one behind
    the final norm.

    Raises:
        NumericalError: The model produces NaN or infinity.
    """
    captured = []
    for tokens in batches:
        inputs = Spool()
        arguments: list[dict[str, Any]] = []

        def keep(
            _module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            inputs: Spool = inputs,
            arguments: list[dict[str, Any]] = arguments,
        ) -> None:
            inputs.append(args[0] if args else kwargs.pop("hidden_states"))
            arguments.append({**kwargs, "past_key_values": None, "use_cache": False})

        hooks = [layer.register_forward_pre_hook(keep, with_kwargs=True) for layer in view.layers]
        try:
            final = view.decoder(input_ids=tokens, use_cache=False).last_hidden_state
        finally:
            for hook in hooks:
                hook.remove()
        if not torch.isfinite(final).all():
            raise NumericalError(
                "the model produces NaN or infinity on the calibration set",
                hint="load it in float32 or bfloat16 and check its weights",
            )
        captured.append(Batch(tokens, inputs, tuple(arguments), final))
    return captured


def run_layers(layers: Iterable[nn.Module], hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Send ``(samples, length, hidden)`` through layers, one after the other."""
    for layer in layers:
        output = layer(hidden, **arguments)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden
