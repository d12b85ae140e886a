"""Place a model that exceeds one GPU on other GPUs, memory and disk.

accelerate computes the device map. All layers run on the first GPU; a layer placed elsewhere is
streamed from there. accelerate's own dispatch is not used, because it ties weights to their
original modules, and merged layers have others.
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

# Share of a GPU's free memory that weights may take; the rest is for activations.
ROOM = 0.8


@dataclass(frozen=True, slots=True, eq=False)
class Resident:
    """A source of streamed values: a tensor on another device."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the values."""
        return tuple(self.tensor.shape)

    def read(self) -> Tensor:
        """The tensor itself; a forward pass copies it to its device."""
        return self.tensor


def outgrows(device: torch.device, checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint's weights exceed a GPU's memory."""
    if device.type != "cuda":
        return False
    free, _ = torch.cuda.mem_get_info(device)
    return total_bytes(checkpoint.stored.values()) > ROOM * free


def places(
    model: PreTrainedModel, max_memory: Mapping[int | str, int] | None = None
) -> dict[str, Any]:
    """Accelerate's device map of a model: GPU numbers, ``cpu`` or ``disk``.

    Args:
        model: A streamed model.
        max_memory: Bytes by device; by default the free memory.

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


def place_layers(model: PreTrainedModel, where: Mapping[str, Any]) -> None:
    """Move the layers of a streamed model to their devices; layers on disk stay there.

    Args:
        model: The model, changed in place.
        where: The device map from `places`.
    """
    # The parameter's device has a number, which the recipe's may lack.
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
            else stub_for(Resident(loaded), loaded.dtype, home)
        )
        setattr(model.get_submodule(path), name, put)


def _place(name: str, where: Mapping[str, Any]) -> Any:
    """The device of the longest prefix of a parameter's name in the device map."""
    parts = name.split(".")
    prefixes = (".".join(parts[:end]) for end in range(len(parts), -1, -1))
    return next((where[prefix] for prefix in prefixes if prefix in where), "disk")
