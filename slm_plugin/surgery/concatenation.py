"""One layer of the channels and heads of several, as listed by a plan's `LayerPart`.

Source: CoMe (arXiv 2510.15304), channel merging.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_plugin.errors import PlanError
from slm_plugin.lazy import nn, torch
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.streaming import derived, values
from slm_plugin.models.view import projections
from slm_plugin.plans import LayerPart
from slm_plugin.surgery.groups import READERS, axis, channel_members, kv_group_members, pieces
from slm_plugin.surgery.merge_rules import merge_weights, share_parameters

if TYPE_CHECKING:
    from torch import Tensor


def concatenated_layer(
    parts: Sequence[LayerPart], layers: Sequence[nn.Module], dimensions: Dimensions
) -> nn.Module:
    """One layer made of parts of several, which are unchanged.

    Rows of q, k, v, gate and up, with their biases, and columns of o and down are concatenated, so
    the query heads of a KV group stay adjacent. Parameters outside units are weighted means: all
    norms, and the biases of o and down.

    Args:
        parts: The units of each layer.
        layers: The layers, in the same order.
        dimensions: Sizes of a layer.

    Raises:
        PlanError: The parts do not make a layer of the same shape.
    """
    _check(
        "MLP channels",
        [(part.layer, part.channels) for part in parts],
        dimensions.intermediate_size,
    )
    _check("KV groups", [(part.layer, part.kv_groups) for part in parts], dimensions.kv_heads)
    members = [
        {**channel_members(part.channels), **kv_group_members(part.kv_groups, dimensions)}
        for part in parts
    ]
    norms = _weighted(part.norm_share for part in parts)
    biases = _weighted(part.bias_share for part in parts)
    made = share_parameters(layers[0])
    family = dimensions.family
    short = {id(linear): name for name, linear in projections(made, family).items()}
    for name, parameter in list(made.named_parameters()):
        path, _, leaf = name.rpartition(".")
        owner = made.get_submodule(path)
        projection = short.get(id(owner))
        given = tuple(layer.get_parameter(name) for layer in layers)
        if projection is None:
            merged = merge_weights(norms, given)
        elif leaf == "bias" and projection in READERS:
            merged = merge_weights(biases, given)
        else:
            dim = axis(projection) if leaf == "weight" else 0
            # Of a matrix with several projections, those of all layers one after the other.
            rows = [pieces(member, projection, dimensions) for member in members]
            count = len(family.parts(projection))
            merged = joined(given * count, tuple(itertools.chain(*zip(*rows, strict=True))), dim)
        if not isinstance(merged, nn.Parameter):
            merged = nn.Parameter(merged, requires_grad=parameter.requires_grad)
        setattr(owner, leaf, merged)
    return made


def joined(weights: tuple[Tensor, ...], indices: tuple[tuple[int, ...], ...], dim: int) -> Tensor:
    """Concatenated slices of tensors.

    Args:
        weights: Tensors of one shape.
        indices: The indices of each tensor to take, along ``dim``.
        dim: The axis.

    Returns:
        The tensor; streamed if the weights are.
    """
    return derived(Joined(weights, indices, dim), weights)


@dataclass(frozen=True, slots=True, eq=False)
class Joined:
    """A source of streamed values: slices of other weights, read on every use."""

    weights: tuple[Tensor, ...]
    indices: tuple[tuple[int, ...], ...]
    dim: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the concatenated slices."""
        shape = list(self.weights[0].shape)
        shape[self.dim] = sum(map(len, self.indices))
        return tuple(shape)

    def read(self) -> Tensor:
        """Slice, with one of the weights in memory at a time."""
        slices = []
        for weight, indices in zip(self.weights, self.indices, strict=True):
            whole = values(weight)
            chosen = torch.tensor(indices, dtype=torch.long, device=whole.device)
            slices.append(whole.index_select(self.dim, chosen))
        return torch.cat(slices, self.dim)


def _weighted(shares: Iterable[float]) -> str:
    """The merge rule that averages layers with these shares."""
    return f"weighted({','.join(f'{share:.12f}' for share in shares)})"


def _check(units: str, given: Sequence[tuple[int, tuple[int, ...]]], size: int) -> None:
    for layer, indices in given:
        if len(set(indices)) != len(indices) or max(indices, default=0) >= size:
            raise PlanError(
                f"concat_layers must list different {units} of layer {layer}, all below {size}",
                hint="correct the indices",
            )
    total = sum(len(indices) for _, indices in given)
    if total != size:
        first, last = given[0][0], given[-1][0]
        raise PlanError(
            f"layers {first} to {last} give {total} {units} to one layer, which has {size}",
            hint="correct the indices",
        )
