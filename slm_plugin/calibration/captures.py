"""What the layers of a model see on the calibration set: captured once, used by every strategy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slm_plugin.calibration.spool import Spool
from slm_plugin.errors import NumericalError
from slm_plugin.lazy import inference_mode, nn, torch
from slm_plugin.models.streaming import held
from slm_plugin.models.view import DecoderView

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Batch:
    """Layer inputs of some samples.

    Attributes:
        tokens: Token ids, ``(samples, length)``.
        inputs: Input of every layer, each ``(samples, length, hidden)``, read from disk, and as
            one more the last layer's output, before the final norm.
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


@inference_mode
def capture(view: DecoderView, batches: Iterable[Tensor]) -> list[Batch]:
    """Run the decoder once over every batch and keep what its layers see.

    Each layer runs on all batches before the next one does, so that a layer which is streamed
    from disk is read once. ``output_hidden_states`` would not do: it returns the last layer's
    output behind the final norm.

    Raises:
        NumericalError: The model produces NaN or infinity.
    """
    asked = list(batches)
    hidden: list[Tensor] = []
    # Without padding, masks and positions depend on the shape alone: one of each is kept.
    by_shape: dict[torch.Size, tuple[dict[str, Any], ...]] = {}
    for tokens in asked:
        embedded, said = enter(view, tokens)
        hidden.append(embedded)
        by_shape.setdefault(tokens.shape, said)
    arguments = [by_shape[tokens.shape] for tokens in asked]
    inputs = [Spool() for _ in asked]
    for index, layer in enumerate(view.layers):
        with held(layer):
            for batch, spool in enumerate(inputs):
                spool.append(hidden[batch])
                hidden[batch] = run_layers([layer], hidden[batch], arguments[batch][index])
    for batch, spool in enumerate(inputs):
        spool.append(hidden[batch])
        hidden[batch] = view.norm(hidden[batch])
    if not all(torch.isfinite(final).all() for final in hidden):
        raise NumericalError(
            "the model produces NaN or infinity on the calibration set",
            hint="load it in float32 or bfloat16 and check its weights",
        )
    return [Batch(*fields) for fields in zip(asked, inputs, arguments, hidden, strict=True)]


def run_batches(
    layers: Iterable[tuple[int, nn.Module]], batches: Sequence[Batch], hidden: Iterable[Tensor]
) -> list[Tensor]:
    """Send hidden states of batches through layers.

    Layers are the outer loop, so that a layer which is streamed from disk is read once.

    Args:
        layers: The layers in order, each with the index of the captured layer whose mask and
            positions it takes.
        batches: What was captured.
        hidden: What the first layer sees of each batch, ``(samples, length, hidden)``.

    Returns:
        What the last layer makes of each batch.
    """
    states = list(hidden)
    for index, layer in layers:
        with held(layer):
            for number, batch in enumerate(batches):
                states[number] = run_layers([layer], states[number], batch.arguments[index])
    return states


def enter(view: DecoderView, tokens: Tensor) -> tuple[Tensor, tuple[dict[str, Any], ...]]:
    """What the decoder hands to its layers, without running one.

    Args:
        view: The model.
        tokens: Token ids, ``(samples, length)``.

    Returns:
        The input of the first layer, ``(samples, length, hidden)``, and the keyword arguments of
        every layer: mask, positions.
    """
    from slm_plugin.models.torch_subclasses import Listener

    layers = view.layers
    boxed = _returns_tuple(view, tokens)
    listeners = [Listener(layer, boxed=boxed) for layer in layers]
    view.put_layers(nn.ModuleList(listeners))
    try:
        view.decoder(**view.inputs(tokens))
    finally:
        view.put_layers(layers)
    return listeners[0].hidden, tuple(listener.arguments for listener in listeners)


# Whether layers of a class return tuples, which differs between releases of transformers.
_boxed: dict[type[nn.Module], bool] = {}


def _returns_tuple(view: DecoderView, tokens: Tensor) -> bool:
    """Whether the model's layers return tuples: run two tokens through the first one and see."""
    first = view.layers[0]
    if type(first) not in _boxed:
        found: list[object] = []
        hook = first.register_forward_hook(lambda layer, given, output: found.append(output))
        layers = view.layers
        view.put_layers(nn.ModuleList([first]))
        try:
            with held(first):
                view.decoder(**view.inputs(tokens[:1, :2]))
        finally:
            hook.remove()
            view.put_layers(layers)
        _boxed[type(first)] = isinstance(found[0], tuple)
    return _boxed[type(first)]


def run_layers(layers: Iterable[nn.Module], hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Send ``(samples, length, hidden)`` through layers, one after the other."""
    for layer in layers:
        output = layer(hidden, **arguments)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden
