"""Operators: linear residual-stream maps between layers, which no stock model class has.

Because of the skip connection, a matrix that multiplies the residual stream cannot be folded into
the weights of a layer. It becomes a separate module at the end of the preceding layer, or of the
embedding. In memory such a model runs, generates and is measured like any other. A traced graph
stores the operators; a checkpoint cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from slm_plugin.lazy import nn, torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

NAME = "stream_operator"


def put_operator(module: nn.Module, matrix: Tensor) -> None:
    """Multiply the output of a module by a matrix.

    Args:
        module: A decoder layer, or the embedding; changed in place.
        matrix: ``(hidden, hidden)``; states are rows to its left. It gets the device and
            the number format of the module.

    Raises:
        ValueError: The module has an operator already.
    """
    if hasattr(module, NAME):
        raise ValueError("the module has an operator already")
    like = next(module.parameters())
    width = len(matrix)
    linear = nn.Linear(width, width, bias=False, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        linear.weight.copy_(matrix.T)
    module.add_module(NAME, linear.train(module.training))
    module.register_forward_hook(_multiply)


def operators(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """All operators of a model, by the path of their module."""
    return {
        path.removesuffix(f".{NAME}"): module
        for path, module in model.named_modules()
        if path.endswith(f".{NAME}") and isinstance(module, nn.Linear)
    }


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The named parameters of a layer, without those of its operator."""
    for name, parameter in module.named_parameters():
        if not name.startswith(f"{NAME}."):
            yield name, parameter


@contextmanager
def without_operators(model: PreTrainedModel) -> Iterator[None]:
    """Remove the operators during a block, so that the model has only stock modules."""
    taken = [(model.get_submodule(path), linear) for path, linear in operators(model).items()]
    for module, _ in taken:
        delattr(module, NAME)
    try:
        yield
    finally:
        for module, linear in taken:
            module.add_module(NAME, linear)


def is_operator_hook(hook: object) -> bool:
    """Whether a hook of a module is the one that applies its operator."""
    return hook is _multiply


def _multiply(module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
    # A plain function, so that a copy of the module keeps it and uses its own operator.
    operator = getattr(module, NAME, None)
    return output if operator is None else with_state(output, operator)


def with_state(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A layer's output, the state or a tuple that begins with it, with the state changed."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return change(output)
