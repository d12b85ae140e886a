"""Subclasses of PyTorch's classes, which only functions import: defining them imports PyTorch."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from slm_plugin.lazy import nn, torch

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.models.streaming import Source


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


class Listener(nn.Module):
    """Stands in for a layer: notes what the decoder hands to it and passes its input through.

    Args:
        layer: The layer.
        boxed: Whether the layer returns a tuple, as its decoder then expects.
    """

    def __init__(self, layer: nn.Module, *, boxed: bool) -> None:
        super().__init__()
        self.boxed = boxed
        # Not a submodule: some releases choose mask and positions by attributes of the layer.
        self.__dict__["layer"] = layer
        self.hidden = torch.empty(0)
        self.arguments: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        """What the layer has."""
        return getattr(self.__dict__["layer"], name)

    def forward(
        self, hidden_states: Tensor, *positional: Any, **arguments: Any
    ) -> Tensor | tuple[Tensor]:
        """Note the input and the arguments, all by name."""
        self.hidden = hidden_states
        names = [*inspect.signature(self.__dict__["layer"].forward).parameters][1:]
        said = {**dict(zip(names, positional, strict=False)), **arguments}
        # Without a cache, whatever the class calls it.
        off = {"past_key_values": None, "layer_past": None, "use_cache": False}
        self.arguments = said | {name: value for name, value in off.items() if name in said}
        return (hidden_states,) if self.boxed else hidden_states


class Identity(nn.Module):
    """Replaces dropped layers: returns its input."""

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        """Return the input."""
        return hidden_states
