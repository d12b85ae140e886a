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
        weights = [
            {name: linear.weight for name, linear in view.projections(layer).items()}
            for layer in view.layers
        ]
    else:
        weights = [weights_of(layer) for layer in view.layers]
    flat = [weight for layer in weights for weight in layer.values()]
    sums = {id(weight): torch.zeros_like(weight, dtype=torch.float32) for weight in flat}
    samples = 0
    with only_trainable(view.model, flat):
        hooks = [
            weight.register_post_accumulate_grad_hook(_move_into(sums[id(weight)]))  # type: ignore[no-untyped-call]
            for weight in flat
        ]
        try:
            for tokens in _small(batches):
                # The model shifts the labels itself: position t predicts token t+1.
                loss = view.model(**view.inputs(tokens), labels=tokens).loss
                _require_finite(loss)
                (loss * len(tokens)).backward()
                samples += len(tokens)
        finally:
            for hook in hooks:
                hook.remove()
    for total in sums.values():
        total /= samples
    return [{name: sums[id(weight)] for name, weight in layer.items()} for layer in weights]


def _small(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    for tokens in batches:
        yield from split(tokens, BACKWARD_TOKENS)


def _move_into(total: Tensor) -> Callable[[Tensor], None]:
    def move(weight: Tensor) -> None:
        if weight.grad is not None:
            total.add_(weight.grad)
        weight.grad = None

    return move


def _require_finite(loss: Tensor) -> None:
    if not torch.isfinite(loss):
        raise NumericalError(
            f"the calibration loss is {loss.item():g}",
            hint="load the model in float32 or bfloat16 and give samples of 2 tokens or more",
        )
