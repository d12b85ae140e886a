"""Layers composed of the blocks that remain when attention and MLP blocks are dropped.

A decoder is the sequence attention 0, MLP 0, attention 1, MLP 1, … of blocks on one residual
stream, each with its own norm. A stock model class supports the remaining blocks exactly if
attention and MLP still alternate: each attention then forms a layer with the MLP after it.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from slm_plugin.errors import PlanError
from slm_plugin.plans import DropSublayers
from slm_plugin.surgery.merge_rules import share_parameters

if TYPE_CHECKING:
    from torch import nn

# The modules of a layer's MLP block in all supported architectures; the others are attention.
MLP_BLOCK = ("mlp", "post_attention_layernorm")


def composed_layer(attention: nn.Module, mlp: nn.Module) -> nn.Module:
    """The attention of one layer followed by the MLP of another, each with its own norm.

    The new layer shares the parameters; the given layers are unchanged.
    """
    made = share_parameters(attention)
    for name in MLP_BLOCK:
        setattr(made, name, share_parameters(mlp.get_submodule(name)))
    return made


def pairs_left(operations: Iterable[DropSublayers], layers: int) -> list[tuple[int, int]]:
    """The layers of the result, as the original layers of their attention and their MLP.

    Args:
        operations: The blocks to drop.
        layers: Layers of the model.

    Raises:
        PlanError: A block does not exist or is dropped twice, or the rest does not alternate.
    """
    given = list(operations)
    attention = _once("attention", [i for op in given for i in op.attention], layers)
    mlp = _once("MLP", [i for op in given for i in op.mlp], layers)
    left = [
        (name, index)
        for index in range(layers)
        for name, gone in (("attention", attention), ("MLP", mlp))
        if index not in gone
    ]
    for place, (wanted, (name, index)) in enumerate(
        zip(itertools.cycle(("attention", "MLP")), left, strict=False)
    ):
        if name != wanted:
            before = f"after that of layer {left[place - 1][1]}" if place else "first"
            raise PlanError(
                f"the {name} of layer {index} would come {before}: no stock model class has layers "
                "without one of both",
                hint="with every MLP drop its own attention or that of the next layer left",
            )
    indices = [index for _, index in left]
    return list(zip(indices[::2], indices[1::2], strict=True))


def _once(name: str, indices: Sequence[int], layers: int) -> set[int]:
    for index, times in Counter(indices).items():
        if index >= layers:
            raise PlanError(f"the plan names layer {index}; the model has {layers} layers")
        if times > 1:
            raise PlanError(f"the plan drops the {name} of layer {index} {times} times")
    return set(indices)
