"""Spread a model that one GPU cannot hold over what there is: other GPUs, memory, disk.

accelerate decides what lies where. Everything runs on the first GPU; a layer that lies elsewhere
is a streamed one whose source is that place. accelerate's own dispatch would tie weights to the
modules that they were loaded into, which merged layers outlive.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slm_plugin.extras import require
from slm_plugin.lazy import nn, torch
from slm_plugin.models.stored import total_bytes
from slm_plugin.models.streaming import is_stub, stub_for, values
from slm_plugin.models.view import DecoderView

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from slm_plugin.models.checkpoint import Checkpoint

# Share of a GPU's free memory that weights may take; the rest is for what passes through them.
ROOM = 0.8


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A source of streamed values: a tensor on another device."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return tuple(self.tensor.shape)

    def read(self) -> Tensor:
        """The tensor itself; whoever runs with it copies it to where it is needed."""
        return self.tensor


def outgrows(device: torch.device, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's weights are more than a GPU has room for."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return total_bytes(checkpoint.stored.values()) > ROOM * free


def places(
    model: PreTrainedModel, max_memory: Mapping[int | str, int] | None = None
) -> dict[str, Any]:
    """Where accelerate would put the parts of a model: GPU numbers, ``cpu`` or ``disk``.

    Args:
        model: A streamed model.
        max_memory: Bytes by device; by default what is free.

    Raises:
        MissingExtraError: accelerate is not installed.
    """
    require("big", "a model larger than the GPU")
    from accelerate import infer_auto_device_map

    layer = type(DecoderView.of(model).layers[0]).__name__
    found: dict[str, Any] = infer_auto_device_map(
        model,
        max_memory=None if max_memory is None else dict(max_memory),
        no_split_module_classes=[layer],
    )
    return found


def settle(model: PreTrainedModel, where: Mapping[str, Any]) -> None:
    """Put the layers of a streamed model in their places; what is for the disk stays there.

    Args:
        model: The model, changed in place.
        where: What `places` found.
    """
    # By the parameter: unlike what a recipe names, its device has a number.
    home = DecoderView.of(model).embedding.weight.device
    for full, parameter in list(model.named_parameters()):
        place = _place(full, where)
        if place == "disk" or not is_stub(parameter):
            continue
        device = torch.device(place)
        loaded = values(parameter).to(device)
        path, _, name = full.rpartition(".")
        put = (
            nn.Parameter(loaded, requires_grad=False)
            if device == home
            else stub_for(Kept(loaded), loaded.dtype, home)
        )
        setattr(model.get_submodule(path), name, put)


def _place(name: str, where: Mapping[str, Any]) -> Any:
    """The device of the longest part of a parameter's name that has one."""
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), -1, -1))
    return next((where[prefix] for prefix in prefixes if prefix in where), "disk")
