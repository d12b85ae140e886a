"""Streamed weights: read before a module runs, freed after it.

A streamed module is an ordinary one whose parameters are `StreamedParameter`: they have a shape
and a number format, are on PyTorch's meta device, and have a source of values. Modules that share
such a parameter share its source, so merged layers need no memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

from typing_extensions import TypeIs

from slm_plugin.lazy import nn, torch

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.models.torch_subclasses import StreamedParameter


class Source(Protocol):
    """A source of values: a position in a file, or a formula over other sources."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        ...

    def read(self) -> Tensor:
        """The values, in memory of their own."""
        ...


def is_stub(parameter: Tensor) -> TypeIs[StreamedParameter]:
    """Whether a parameter is one without memory."""
    from slm_plugin.models.torch_subclasses import StreamedParameter

    return isinstance(parameter, StreamedParameter)


def stub_for(source: Source, dtype: torch.dtype, home: torch.device) -> StreamedParameter:
    """A parameter without memory, whose values come from a source."""
    from slm_plugin.models.torch_subclasses import StreamedParameter

    return StreamedParameter(source, dtype, home)


def derived(source: Source, weights: Iterable[Tensor]) -> Tensor:
    """The result of a formula over weights; streamed if one of them is."""
    streamed = next((w for w in weights if is_stub(w)), None)
    if streamed is None:
        return source.read()
    return stub_for(source, streamed.dtype, streamed.home)


def values(parameter: Tensor) -> Tensor:
    """The values of a parameter, read from its source when it is streamed; no gradient.

    Raises:
        ModelSourceError: The file that holds them cannot be read.
    """
    if is_stub(parameter):
        return parameter.source.read().to(parameter.home, parameter.dtype)
    return parameter.detach()


def is_streamed(module: nn.Module) -> bool:
    """Whether any parameter of a module is not in memory."""
    return any(is_stub(parameter) for parameter in module.parameters())


@contextmanager
def held(module: nn.Module) -> Iterator[None]:
    """Hold a module's weights in memory during a block; no effect on an ordinary module."""
    taken = _take(module)
    try:
        yield
    finally:
        _give_back(taken)


def run_streamed(module: nn.Module) -> None:
    """Make a module read its weights before each forward pass and free them after it.

    The hooks are plain functions, so a copy of the module keeps them and uses its own weights.
    """
    module.register_forward_pre_hook(_before)
    module.register_forward_hook(_after, always_call=True)


_Taken: TypeAlias = "list[tuple[nn.Module, str, StreamedParameter]]"


def _take(module: nn.Module) -> _Taken:
    stubs = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if is_stub(parameter)
    ]
    taken: _Taken = []
    try:
        for part, name, stub in stubs:
            setattr(part, name, nn.Parameter(values(stub), requires_grad=False))
            taken.append((part, name, stub))
    except BaseException:
        _give_back(taken)
        raise
    return taken


def _give_back(taken: _Taken) -> None:
    for part, name, stub in taken:
        setattr(part, name, stub)


def _before(module: nn.Module, _args: tuple[Any, ...]) -> None:
    # Weights that an outer block holds are freed by that block.
    taken = _take(module)
    if taken:
        module.__dict__["_slm_taken"] = taken


def _after(module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
    _give_back(module.__dict__.pop("_slm_taken", []))
