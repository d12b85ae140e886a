"""Streamed weights: read before a module runs, freed after it.

A streamed module is an ordinary one whose parameters are `StreamedParameter`: they have a shape
and a number format, are on PyTorch's meta device, and have a source of values. Modules that share
such a parameter share its source, so merged layers need no memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn


class Source(Protocol):
    """A source of values: a position in a file, or a formula over other sources."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        ...

    def read(self) -> Tensor:
        """The values, in memory of their own."""
        ...


class StreamedParameter(nn.Parameter):
    """A parameter without memory that reads its values from a source.

    Args:
        source: The source of its values.
        dtype: Number format in memory.
        home: Device for the values.
    """

    source: Source
    home: torch.device

    def __new__(cls, source: Source, dtype: torch.dtype, home: torch.device) -> StreamedParameter:
        """Make the parameter; ``nn.Parameter`` makes its instances here too."""
        stub = torch.empty(source.shape, dtype=dtype, device="meta")
        made: StreamedParameter = super().__new__(cls, stub, requires_grad=False)
        made.source = source
        made.home = home
        return made

    def __init__(self, source: Source, dtype: torch.dtype, home: torch.device) -> None:
        super().__init__()

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamedParameter:
        """A reference to values that never change needs no copy."""
        return self


def derived(source: Source, weights: Iterable[Tensor]) -> Tensor:
    """The result of a formula over weights; streamed if one of them is."""
    streamed = next((w for w in weights if isinstance(w, StreamedParameter)), None)
    if streamed is None:
        return source.read()
    return StreamedParameter(source, streamed.dtype, streamed.home)


def values(parameter: Tensor) -> Tensor:
    """The values of a parameter, read from its source when it is streamed; no gradient.

    Raises:
        ModelSourceError: The file that holds them cannot be read.
    """
    if isinstance(parameter, StreamedParameter):
        return parameter.source.read().to(parameter.home, parameter.dtype)
    return parameter.detach()


def is_streamed(module: nn.Module) -> bool:
    """Whether any parameter of a module is not in memory."""
    return any(isinstance(parameter, StreamedParameter) for parameter in module.parameters())


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


_Taken = list[tuple[nn.Module, str, StreamedParameter]]


def _take(module: nn.Module) -> _Taken:
    stubs = [
        (part, name, parameter)
        for part in module.modules()
        for name, parameter in part.named_parameters(recurse=False)
        if isinstance(parameter, StreamedParameter)
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
