"""What the layers of a model see on the calibration set: captured once, used by every strategy."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from slm_plugin.calibration.frames import valid_frames
from slm_plugin.calibration.spool import Projected, Spool, in_coordinates
from slm_plugin.errors import NumericalError
from slm_plugin.lazy import inference_mode, nn, torch
from slm_plugin.models.streaming import held
from slm_plugin.models.view import DecoderView

if TYPE_CHECKING:
    from torch import Tensor

    # Token ids ``(samples, length)``, or tensors by the names that the class gives its inputs.
    Given = Tensor | Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Batch:
    """Layer inputs of some samples.

    Attributes:
        tokens: Token ids, ``(samples, length)``; without columns where other tensors are read.
        inputs: Input of every layer, each ``(samples, length, hidden)``, read from disk, and as
            one more the last layer's output, before the final norm.
        arguments: Keyword arguments that the model hands to every layer: mask, positions.
        final: Hidden state behind the final norm, ``(samples, length, hidden)``.
        valid: Positions that are no padding, ``(samples, length)``; None where all count.
        sees_all: Every position attends to all others; else the last one does.
    """

    tokens: Tensor
    inputs: Spool | Projected
    arguments: tuple[dict[str, Any], ...]
    final: Tensor
    valid: Tensor | None = None
    sees_all: bool = False


def projected(batch: Batch, basis: Tensor) -> Batch:
    """A batch with its hidden states in other coordinates.

    Args:
        batch: The batch.
        basis: The vectors of the new coordinates in its columns, ``(hidden, coordinates)``.
    """
    final = in_coordinates(batch.final, basis)
    return replace(batch, inputs=Projected(batch.inputs, basis), final=final)


def split(tokens: Tensor, batch_tokens: int) -> Iterator[Tensor]:
    """Cut ``(samples, length)`` into batches of at most ``batch_tokens``, or one sample each."""
    yield from torch.split(tokens, max(1, batch_tokens // tokens.shape[1]))


@inference_mode
def capture(view: DecoderView, batches: Iterable[Given]) -> list[Batch]:
    """Run the layers once over every batch and keep what its layers see.

    Each layer runs on all batches before the next one does, so that a layer which is streamed
    from disk is read once. ``output_hidden_states`` would not do: it returns the last layer's
    output behind the final norm.

    Raises:
        NumericalError: The model produces NaN or infinity.
    """
    asked = list(batches)
    hidden, arguments = _entered(view, asked)
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
    return [_batch(view, *fields) for fields in zip(asked, inputs, arguments, hidden, strict=True)]


@inference_mode
def first_inputs(view: DecoderView, batches: Iterable[Tensor]) -> list[Batch]:
    """What the first layer sees of every batch: no layer runs, so there is no final state.

    Args:
        view: The model.
        batches: Token ids, each ``(samples, length)``.
    """
    asked = list(batches)
    made = []
    for tokens, hidden, arguments in zip(asked, *_entered(view, asked), strict=True):
        inputs = Spool()
        inputs.append(hidden)
        made.append(Batch(tokens, inputs, arguments, hidden.new_empty(0)))
    return made


def _entered(
    view: DecoderView, asked: Iterable[Given]
) -> tuple[list[Tensor], list[tuple[dict[str, Any], ...]]]:
    """For every batch the first layer's input, and the arguments of all layers."""
    hidden: list[Tensor] = []
    # Without padding, masks and positions depend on the shape alone: one of each is kept.
    by_shape: dict[torch.Size, tuple[dict[str, Any], ...]] = {}
    arguments = []
    for given in asked:
        embedded, said = enter(view, given)
        hidden.append(embedded)
        if not isinstance(given, Mapping):
            said = by_shape.setdefault(given.shape, said)
        arguments.append(said)
    return hidden, arguments


def _batch(
    view: DecoderView,
    given: Given,
    inputs: Spool,
    arguments: tuple[dict[str, Any], ...],
    final: Tensor,
) -> Batch:
    if not isinstance(given, Mapping):
        return Batch(given, inputs, arguments, final)
    none = torch.empty((len(final), 0), dtype=torch.long)
    valid = valid_frames(view, given, final.shape[1])
    return Batch(none, inputs, arguments, final, valid, view.family.sees_all)


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


def enter(view: DecoderView, given: Given) -> tuple[Tensor, tuple[dict[str, Any], ...]]:
    """What the model hands to its layers, without running one.

    Args:
        view: The model.
        given: Token ids, ``(samples, length)``, or the tensors that its class reads.

    Returns:
        The input of the first layer, ``(samples, length, hidden)``, and the keyword arguments of
        every layer: mask, positions.
    """
    from slm_plugin.models.torch_subclasses import Listener

    layers = view.layers
    boxed = _returns_tuple(view, given)
    listeners = [Listener(layer, boxed=boxed) for layer in layers]
    view.put_layers(nn.ModuleList(listeners))
    try:
        _run(view, given)
    finally:
        view.put_layers(layers)
    return listeners[0].hidden, tuple(listener.arguments for listener in listeners)


def _run(view: DecoderView, given: Given) -> None:
    """Call the model without its head, or the part of it that holds the layers."""
    if not isinstance(given, Mapping):
        view.decoder(**view.inputs(given))
        return
    family = view.family
    # Entered anew each time: a class may write zeros over what it is given.
    view.decoder.get_submodule(family.entry)(
        **{name: tensor.clone() for name, tensor in given.items()}, **family.passed
    )


# Whether layers of a class return tuples, which differs between releases of transformers.
_boxed: dict[type[nn.Module], bool] = {}


def _returns_tuple(view: DecoderView, given: Given) -> bool:
    """Whether the model's layers return tuples: run a little through the first one and see."""
    first = view.layers[0]
    if type(first) not in _boxed:
        found: list[object] = []
        hook = first.register_forward_hook(lambda layer, given, output: found.append(output))
        layers = view.layers
        view.put_layers(nn.ModuleList([first]))
        try:
            with held(first):
                _run(view, _little(given))
        finally:
            hook.remove()
            view.put_layers(layers)
        _boxed[type(first)] = isinstance(found[0], tuple)
    return _boxed[type(first)]


def _little(given: Given) -> Given:
    """Two tokens, or one sample where it cannot be cut."""
    if isinstance(given, Mapping):
        return {name: tensor[:1] for name, tensor in given.items()}
    return given[:1, :2]


def run_layers(layers: Iterable[nn.Module], hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Send ``(samples, length, hidden)`` through layers, one after the other."""
    for layer in layers:
        output = layer(hidden, **arguments)
        hidden = output[0] if isinstance(output, tuple) else output
    return hidden


def layer_runs(batches: Sequence[Batch], index: int) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """The captured input and arguments of one layer, by batch."""
    return ((batch.inputs[index], batch.arguments[index]) for batch in batches)


def projection_inputs(
    layer: nn.Module, projection: nn.Module, runs: Iterable[tuple[Tensor, dict[str, Any]]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run a layer, and record the input of one of its projections.

    Args:
        layer: The layer.
        projection: A linear map in it.
        runs: Hidden states, ``(samples, length, hidden)``, and the layer's arguments, by batch.

    Returns:
        For each batch the projection's input, ``(samples, length, features)``, and the layer's
        output, ``(samples, length, hidden)``.
    """
    seen: list[Tensor] = []
    hook = projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    try:
        for hidden, arguments in runs:
            output = run_layers([layer], hidden, arguments)
            # OPT hands the tokens of all samples to its MLP as one list.
            yield seen.pop().reshape(*output.shape[:-1], -1), output
    finally:
        hook.remove()


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on its device, or on the CPU for MPS, which has no float64."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()
