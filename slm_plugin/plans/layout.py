"""The layers that a plan's operations leave, as the original blocks that they consist of."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from slm_plugin.errors import PlanError
from slm_plugin.plans.operations import Block, DepthOperation

if TYPE_CHECKING:
    from slm_plugin.models.dimensions import Dimensions


def layers_left(operations: Iterable[DepthOperation], layers: int) -> list[tuple[int, int]]:
    """The layers of the result, as the original layers of their attention and their MLP.

    For a merged layer these are the lowest and the highest of the layers in it.

    Args:
        operations: The operations, in any order.
        layers: Layers of the model.

    Raises:
        PlanError: A block does not exist or is used twice, nothing is left, or attention and MLP
            blocks do not alternate in the rest.
    """
    given = list(operations)
    _check_use(given, layers)
    removed = {block for operation in given for block in operation.removed()}
    left = [
        block
        for layer in range(layers)
        for block in (Block("attention", layer), Block("MLP", layer))
        if block not in removed
    ]
    if not left:
        raise PlanError("the plan removes every layer of the model")
    _check_alternation(left)
    indices = [block.layer for block in left]
    return list(zip(indices[::2], indices[1::2], strict=True))


def check_fixed(operations: Iterable[DepthOperation], model: Dimensions) -> None:
    """Check that no operation on layers touches one that must stay where it is.

    Raises:
        PlanError: One does.
    """
    fixed = model.fixed_layers
    used = (block.layer for operation in operations for block in operation.used())
    touched = min(used, default=fixed)
    if touched < fixed:
        raise PlanError(
            f"the plan changes layer {touched}; the lowest {fixed} layers of {model.architecture} "
            "must stay, because features of images are added to what each of them puts out",
            hint=f"name layers from {fixed} on",
        )


def check_even(model: Dimensions) -> None:
    """Check that all layers have one width, as operations on layers need.

    Raises:
        PlanError: They do not.
    """
    if model.layer_widths:
        raise PlanError(
            f"layers of {model.width_range} MLP channels are neither dropped nor merged",
            hint="drop or merge layers before `width` with an `allocation`",
        )


def layer_mapping(operations: Iterable[DepthOperation], layers: int) -> list[int | None]:
    """The layer mapping: new index of every original layer, None for a dropped one.

    A layer with one remaining block maps to the layer with that block.
    """
    given = list(operations)
    mapping: list[int | None] = [None] * layers
    position = {}
    for place, pair in enumerate(layers_left(given, layers)):
        position[pair[0]] = place
        for layer in pair:
            mapping[layer] = place
    for first, last in filter(None, (operation.merged for operation in given)):
        mapping[first : last + 1] = [position[first]] * (last - first + 1)
    return mapping


def _check_use(operations: Sequence[DepthOperation], layers: int) -> None:
    used: set[Block] = set()
    for operation in operations:
        for block in operation.used():
            if block.layer >= layers:
                raise PlanError(
                    f"the plan names layer {block.layer}; the model has {layers} layers"
                )
            if block in used:
                raise PlanError(f"the plan uses the {block.kind} of layer {block.layer} twice")
            used.add(block)


def _check_alternation(left: Sequence[Block]) -> None:
    for place, (wanted, block) in enumerate(
        zip(itertools.cycle(("attention", "MLP")), left, strict=False)
    ):
        if block.kind != wanted:
            before = f"after that of layer {left[place - 1].layer}" if place else "first"
            raise PlanError(
                f"the {block.kind} of layer {block.layer} would come {before}: no stock model "
                "class has layers without one of both",
                hint="with every MLP drop its own attention or that of the next layer left",
            )
