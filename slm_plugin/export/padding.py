"""Zero padding of layers of different widths to the one width that a stock class has.

A padded channel has zero rows in gate and up and a zero column in down, so it adds nothing,
whatever the activation function is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slm_plugin.lazy import torch
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.view import DecoderView
from slm_plugin.surgery.groups import axis, channel_members, pieces

if TYPE_CHECKING:
    from torch import Tensor


def padded_weights(view: DecoderView) -> dict[str, Tensor]:
    """The tensors of layers that are narrower than the widest, padded, by their names in the model.

    The channels of a layer come first, in their order.

    Returns:
        Weights and biases that replace those in memory; empty where all layers have one width.
    """
    dimensions = view.dimensions()
    paths = {id(module): path for path, module in view.model.named_modules()}
    found: dict[str, Tensor] = {}
    for index, layer in enumerate(view.layers):
        width = dimensions.widths[index]
        if width == dimensions.intermediate_size:
            continue
        for name, linear in view.projections(layer).items():
            if not set(dimensions.family.parts(name)) <= set(channel_members(())):
                continue
            for kind, tensor in linear.named_parameters(recurse=False):
                if kind == "weight" or axis(name) == 0:
                    padded = _padded(tensor.detach(), name, width, dimensions)
                    found[f"{paths[id(linear)]}.{kind}"] = padded
    return found


def padding(view: DecoderView) -> int:
    """Zeros that `padded_weights` adds."""
    dimensions = view.dimensions()
    missing = dimensions.layers * dimensions.intermediate_size - sum(dimensions.widths)
    return missing * dimensions.channel_parameters


def _padded(tensor: Tensor, name: str, width: int, dimensions: Dimensions) -> Tensor:
    """One weight or bias, with zeros for the channels from a layer's width on.

    Args:
        tensor: ``(rows, columns)``, or ``(rows,)`` of a bias.
        name: Short name of its projection.
        width: Channels that the layer has.
        dimensions: Sizes of the decoder, whose largest width the result has.
    """
    places = [i for part in pieces(channel_members(range(width)), name, dimensions) for i in part]
    shape = list(tensor.shape)
    # A fused matrix holds several projections of one width.
    shape[axis(name)] = shape[axis(name)] // width * dimensions.intermediate_size
    padded = torch.zeros(shape, dtype=tensor.dtype, device=tensor.device)
    return padded.index_copy_(axis(name), torch.tensor(places, device=tensor.device), tensor)
