"""Gradients of the calibration loss, computed without side effects on the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from slm_plugin.calibration.captures import split
from slm_plugin.errors import NumericalError
from slm_plugin.lazy import torch
from slm_plugin.models.view import DecoderView

if TYPE_CHECKING:
    from torch import Tensor, nn

# A backward pass holds every layer's activations; a forward pass holds one layer's at a time.
BACKWARD_TOKENS = 512


@contextmanager
def only_trainable(model: nn.Module, parameters: Iterable[Tensor]) -> Iterator[None]:
    """Enable gradients for some parameters only.

    ``requires_grad`` and ``.grad`` of all parameters are restored at the end.
    """
    wanted = {id(parameter) for parameter in parameters}
    found = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    try:
        for parameter, _, _ in found:
            parameter.grad = None
            parameter.requires_grad_(id(parameter) in wanted)
        with torch.enable_grad():
            yield
    finally:
        for parameter, flag, grad in found:
            parameter.requires_grad_(flag)
            parameter.grad = grad


def loss_gradients(
    view: DecoderView,
    batches: Iterable[Tensor],
    weights_of: Callable[[nn.Module], dict[str, Tensor]] | None = None,
) -> list[dict[str, Tensor]]:
    """Gradient of the mean next-token cross-entropy over all batches.

    Each weight's gradient is added to a float32 sum and freed at once. Memory holds one set of
    gradients, and small terms are not lost in half precision.

    Args:
        view: The model.
        batches: Token ids, each ``(samples, length)`` with the same length.
        weights_of: Returns the weights of a layer to differentiate, by name; without it
            those of the linear maps.

    Returns:
        For every layer, by name, the gradient of the weight in the weight's shape, float32.

    Raises:
        NumericalError: The loss is NaN or infinite.
    """
    if weights_of is None:
        weights = _linear_weights(view)
    else:
        weights = [weights_of(layer) for layer in view.layers]
    return gradients_of(view, batches, weights)


def gradients_of(
    view: DecoderView, batches: Iterable[Tensor], weights: list[dict[str, Tensor]]
) -> list[dict[str, Tensor]]:
    """The same for any weights of the model, in the groups in which they are given.

    Raises:
        NumericalError: The loss is NaN or infinite.
    """
    sums = _zeros(weights)
    small = (part for tokens in batches for part in split(tokens, BACKWARD_TOKENS))
    samples = _backward(view, weights, small, lambda name, gradient: sums[name].add_(gradient))
    return _by_layer(weights, sums, samples)


def gradient_moments(
    view: DecoderView, batches: Iterable[Tensor]
) -> tuple[list[dict[str, Tensor]], list[dict[str, Tensor]]]:
    """Mean of the samples' gradients, and mean of their squares: one backward pass per sample.

    Args:
        view: The model.
        batches: Token ids, each ``(samples, length)`` with the same length.

    Returns:
        Twice as `loss_gradients` returns it, for the linear maps.

    Raises:
        NumericalError: The loss is NaN or infinite.
    """
    weights = _linear_weights(view)
    means, squares = _zeros(weights), _zeros(weights)

    def add(name: int, gradient: Tensor) -> None:
        means[name].add_(gradient)
        squares[name].add_(gradient.float().square())

    one_by_one = (sample for tokens in batches for sample in split(tokens, 1))
    samples = _backward(view, weights, one_by_one, add)
    return _by_layer(weights, means, samples), _by_layer(weights, squares, samples)


def _linear_weights(view: DecoderView) -> list[dict[str, Tensor]]:
    return [
        {name: linear.weight for name, linear in view.projections(layer).items()}
        for layer in view.layers
    ]


def _zeros(weights: list[dict[str, Tensor]]) -> dict[int, Tensor]:
    """A float32 sum for every weight, by its identity."""
    flat = (weight for layer in weights for weight in layer.values())
    return {id(weight): torch.zeros_like(weight, dtype=torch.float32) for weight in flat}


def _by_layer(
    weights: list[dict[str, Tensor]], sums: dict[int, Tensor], samples: int
) -> list[dict[str, Tensor]]:
    for total in sums.values():
        total /= samples
    return [{name: sums[id(weight)] for name, weight in layer.items()} for layer in weights]


def _backward(
    view: DecoderView,
    weights: list[dict[str, Tensor]],
    parts: Iterable[Tensor],
    add: Callable[[int, Tensor], object],
) -> int:
    """Hand the gradient of every part's summed loss to a function, weight by weight.

    Each gradient is freed at once.

    Returns:
        The number of samples.
    """
    samples = 0
    flat = [weight for layer in weights for weight in layer.values()]

    def move(weight: Tensor) -> None:
        if weight.grad is not None:
            add(id(weight), weight.grad)
        weight.grad = None

    with only_trainable(view.model, flat):
        hooks = [
            weight.register_post_accumulate_grad_hook(move)  # type: ignore[no-untyped-call]
            for weight in flat
        ]
        try:
            for tokens in parts:
                # The model shifts the labels itself: position t predicts token t+1.
                loss = view.model(**view.inputs(tokens), labels=tokens).loss
                require_finite(loss)
                (loss * len(tokens)).backward()
                samples += len(tokens)
        finally:
            for hook in hooks:
                hook.remove()
    return samples


def require_finite(loss: Tensor) -> None:
    """Check a calibration loss.

    Raises:
        NumericalError: It is NaN or infinite.
    """
    if not torch.isfinite(loss):
        raise NumericalError(
            f"the calibration loss is {loss.item():g}",
            hint="load the model in float32 or bfloat16 and give samples of 2 tokens or more",
        )
