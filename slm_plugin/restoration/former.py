"""The layers of a model as they were before a stage, kept on disk."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_plugin.calibration.spool import Spool
from slm_plugin.lazy import nn
from slm_plugin.models.streaming import is_stub, stub_for
from slm_plugin.surgery.merge_rules import share_parameters

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Spooled:
    """A source of streamed values: a tensor in a temporary file."""

    spool: Spool
    index: int
    shape: tuple[int, ...]

    def read(self) -> Tensor:
        """Read the tensor."""
        return self.spool[self.index]


def on_disk(layers: Iterable[nn.Module]) -> list[nn.Module]:
    """Copies of layers whose weights are in memory only while `held` holds them.

    Raises:
        OutputError: The temporary folder is full.
    """
    spool = Spool()
    copies = []
    for layer in layers:
        copied = share_parameters(layer, own_config=True)
        for name, parameter in list(copied.named_parameters()):
            if is_stub(parameter):
                continue
            owner, _, leaf = name.rpartition(".")
            source = Spooled(spool, len(spool), tuple(parameter.shape))
            spool.append(parameter)
            stub = stub_for(source, parameter.dtype, parameter.device)
            setattr(copied.get_submodule(owner), leaf, stub)
        copies.append(copied)
    return copies
