"""Operators: linear maps of the residual stream, which no stock model class has.

Because of the skip connection, a matrix that multiplies the residual stream cannot be folded into
the weights of a layer. It becomes a separate module at the end of the preceding layer, or of the
embedding; or, where it multiplies the stream and not what a block adds to it, a module of that
block. In memory such a model runs, generates and is measured like any other. A traced graph stores
the operators; a checkpoint cannot.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from slm_plugin.lazy import nn, torch

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

NAME = "stream_operator"
# What a block's operator is called in the norm before the block, what that norm has received, and
# the paths of block and norm in their layer.
_READS_FOR, _RECEIVED, _AT = "_reads_for", "_received", "_at"


def put_operator(module: nn.Module, matrix: Tensor) -> None:
    """Multiply the output of a module by a matrix.

    Args:
        module: A decoder layer, or the embedding; changed in place.
        matrix: ``(hidden, hidden)``; states are rows to its left. It gets the device and
            the number format of the module.

    Raises:
        ValueError: The module has an operator already.
    """
    _insert(module, matrix)
    module.register_forward_hook(_multiply)


def put_shortcut(
    layer: nn.Module, block: str, norm: str, matrix: Tensor, multiplier: float = 1.0
) -> None:
    """Multiply the residual stream by a matrix where a block is added to it.

    With x the stream that the norm before the block receives, B the block, c the multiplier and M
    the matrix, the layer then computes x M + c B(x) in place of x + c B(x): the block puts out
    x (M - 1) / c besides.

    Args:
        layer: A decoder layer; changed in place.
        block: Path of its attention or its MLP.
        norm: Path of the norm before that.
        matrix: ``(hidden, hidden)``; states are rows to its left. It gets the device and the number
            format of the block.
        multiplier: By what the layer multiplies what the block puts out.

    Raises:
        ValueError: The block has an operator already.
    """
    unchanged = torch.eye(len(matrix), device=matrix.device, dtype=matrix.dtype)
    _connect(layer, block, norm, (matrix - unchanged) / multiplier)


def _connect(layer: nn.Module, block: str, norm: str, added: Tensor) -> None:
    module, before = layer.get_submodule(block), layer.get_submodule(norm)
    linear = _insert(module, added)
    vars(linear)[_AT] = (block, norm)
    # Not as a module of the norm: its weight is the block's.
    vars(before)[_READS_FOR] = linear
    before.register_forward_pre_hook(_receive)
    module.register_forward_hook(_add)


def put_copies(model: PreTrainedModel, found: Mapping[str, nn.Linear]) -> None:
    """Give a model the operators of another one of the same layers.

    Args:
        model: The model; changed in place.
        found: The operators, as `operators` names them.
    """
    for path, linear in found.items():
        if places := vars(linear).get(_AT):
            layer = model.get_submodule(path.removesuffix(f".{places[0]}"))
            _connect(layer, places[0], places[1], linear.weight.T)
        else:
            put_operator(model.get_submodule(path), linear.weight.T)


def _insert(module: nn.Module, matrix: Tensor) -> nn.Linear:
    """Give a module a linear map of its format, as the one that is called `NAME`."""
    if hasattr(module, NAME):
        raise ValueError("the module has an operator already")
    like = next(module.parameters())
    width = len(matrix)
    linear = nn.Linear(width, width, bias=False, device=like.device, dtype=like.dtype)
    with torch.no_grad():
        linear.weight.copy_(matrix.T)
    module.add_module(NAME, linear.train(module.training))
    return linear


def operators(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """All operators of a model, by the path of their module."""
    return {
        path.removesuffix(f".{NAME}"): module
        for path, module in model.named_modules()
        if path.endswith(f".{NAME}") and isinstance(module, nn.Linear)
    }


def own_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The named parameters of a layer, without those of its operators."""
    for name, parameter in module.named_parameters():
        if NAME not in name.split("."):
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
    """Whether a hook of a module is one that applies operators."""
    return hook in (_multiply, _receive, _add)


def _multiply(module: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
    # A plain function, so that a copy of the module keeps it and uses its own operator.
    operator = getattr(module, NAME, None)
    return output if operator is None else with_state(output, operator)


def _receive(norm: nn.Module, given: tuple[Any, ...]) -> None:
    vars(vars(norm)[_READS_FOR])[_RECEIVED] = given[0]


def _add(block: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
    operator = getattr(block, NAME, None)
    if operator is None:
        return output
    stream = vars(operator).pop(_RECEIVED)
    return with_state(output, lambda state: state + operator(stream))


def with_state(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A layer's output, the state or a tuple that begins with it, with the state changed."""
    if isinstance(output, tuple):
        return (change(output[0]), *output[1:])
    return change(output)
