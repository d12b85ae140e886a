"""A plan as the steps that surgery takes: a hybrid plan first removes layers, then narrows them.

All indices of a plan are those of the model that it was made for. A width operation of a hybrid
plan names a layer that is left by its index there, and a merged or joined layer by the lowest of
the layers in it. Steps name layers as the model numbers them when the step is taken.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal, NamedTuple

from slm_plugin.errors import PlanError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.plans.layout import layer_mapping, layers_left
from slm_plugin.plans.operations import DepthOperation, Operation, WidthOperation, by_kind
from slm_plugin.plans.plan import PruningPlan


class Step(NamedTuple):
    """Operations that are carried out together.

    Attributes:
        kind: Whether they are on layers, or on what is in them.
        operations: The operations, with the layers as the model numbers them then.
    """

    kind: Literal["depth", "width"]
    operations: tuple[Operation, ...]


def steps_of(plan: PruningPlan) -> list[Step]:
    """The steps of a plan: one, or two for a hybrid plan.

    Raises:
        PlanError: A width operation of a hybrid plan names a layer that is not left, or the
            operations of one kind do not name all layers that are; or what is left by the depth
            operations is no sequence of layers.
    """
    if plan.kind != "hybrid":
        return [Step(plan.kind, plan.operations)]
    depth, _ = by_kind(plan.operations)
    inside = tuple(operation for operation in plan.operations if operation.kind == "width")
    return [Step("depth", tuple(depth)), Step("width", renumbered(inside, depth, plan.before))]


def renumbered(
    inside: Sequence[Operation], depth: Sequence[DepthOperation], before: Dimensions
) -> tuple[Operation, ...]:
    """Width operations with the numbers that layers have after depth operations.

    Args:
        inside: The width operations, with the layers as ``before`` numbers them.
        depth: The depth operations.
        before: Dimensions of the model.

    Raises:
        PlanError: See `steps_of`.
    """
    named = remaining_layers(depth, before.layers)
    places = {layer: place for place, layer in enumerate(named)}
    _check_named(inside, depth, named, before)
    return tuple(
        operation.model_copy(update={"layer": places[operation.layer]})
        if isinstance(operation, WidthOperation)
        else operation
        for operation in inside
    )


def remaining_layers(depth: Sequence[DepthOperation], layers: int) -> list[int]:
    """For every layer left, the lowest of the original layers in it.

    Raises:
        PlanError: What is left is no sequence of layers.
    """
    return [lowest for lowest, _ in layers_left(depth, layers)]


def _check_named(
    inside: Sequence[Operation],
    depth: Sequence[DepthOperation],
    named: Sequence[int],
    before: Dimensions,
) -> None:
    width = by_kind(inside)[1]
    left = {*named}
    for operation in width:
        operation.check(before)
        layer = operation.layer
        if layer in left:
            continue
        home = layer_mapping(depth, before.layers)[layer]
        if home is None:
            raise PlanError(
                f"{operation.op} names layer {layer}, which the plan removes",
                hint="name the layers that are left, by their index before the plan",
            )
        raise PlanError(
            f"{operation.op} names layer {layer}, which becomes part of layer {named[home]}",
            hint=f"name the lowest of the layers in it: {named[home]}",
        )
    for op in dict.fromkeys(operation.op for operation in width):
        found = Counter(operation.layer for operation in width if operation.op == op)
        wrong = next((layer for layer in named if found[layer] != 1), None)
        if wrong is not None:
            raise PlanError(
                f"{op} names layer {wrong} {found[wrong]} times; the plan leaves "
                f"{len(named)} layers",
                hint=f"give one {op} for every layer that is left, or none",
            )
