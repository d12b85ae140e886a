"""What a width plan removes from each layer, checked before a weight changes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slm_plugin.errors import PlanError
from slm_plugin.extras import require
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.plans import DepthOperation, WidthOperation
from slm_plugin.plans.layout import check_even, check_fixed
from slm_plugin.plans.stream import UNCHANGED, StreamChange


@dataclass(frozen=True, slots=True)
class Removal:
    """The units that a width plan removes.

    Attributes:
        units: By the name of their kind, the indices to remove from every layer.
        before: Dimensions of the model.
        after: Dimensions of the result.
        projected: Rows and columns of projections are removed, and not experts alone.
    """

    units: Mapping[str, Sequence[tuple[int, ...]]]
    before: Dimensions
    after: Dimensions
    projected: bool

    def of_layer(self, index: int) -> dict[str, tuple[int, ...]]:
        """The units to remove from one layer, by the name of their kind; nothing where all stay."""
        return {unit: indices[index] for unit, indices in self.units.items() if indices[index]}


def checked_removal(
    operations: Sequence[WidthOperation], before: Dimensions, stream: StreamChange = UNCHANGED
) -> Removal:
    """What the operations of a width plan remove.

    Args:
        operations: `KeepChannels`, `KeepHeads`, `KeepQueryHeads`, `KeepExperts`, each kind for
            every layer or for none.
        before: Dimensions of the model.
        stream: What is done to the residual stream.

    Raises:
        PlanError: An operation does not fit the model, or layers would differ in more than their
            MLP channels.
        MissingExtraError: Channels or heads are removed and torch-pruning is not installed.
    """
    projected = any(operation.unit != "experts" for operation in operations)
    if projected:
        require("width", "width surgery")
    # Asked for, or had: an operation on units that the model lacks is an error.
    units = dict.fromkeys((*before.units, *(operation.unit for operation in operations)))
    removed = {unit: _removed_units(unit, operations, before) for unit in units}
    _refuse_both(removed)
    stream.check(before)
    return Removal(removed, before, stream.after(_after(removed, before)), projected)


def removal_behind(
    depth: Sequence[DepthOperation],
    width: Sequence[WidthOperation],
    before: Dimensions,
    stream: StreamChange = UNCHANGED,
) -> Removal:
    """What width operations remove from the layers that depth operations leave.

    Args:
        depth: Operations on layers.
        width: Operations on units, with the layers as they are numbered then.
        before: Dimensions of the model.
        stream: What is done to the residual stream.

    Raises:
        PlanError: The operations do not fit the model.
        MissingExtraError: Channels or heads are removed and torch-pruning is not installed.
    """
    if depth:
        check_fixed(depth, before)
        check_even(before)
    removed = sum(operation.layers_removed for operation in depth)
    return checked_removal(width, before.without_layers(removed), stream)


def _removed_units(
    unit: str, operations: Sequence[WidthOperation], before: Dimensions
) -> list[tuple[int, ...]]:
    """Indices of the units of one kind to remove, for every layer.

    Only of MLP channels may one layer keep more than another.
    """
    given = [operation for operation in operations if operation.unit == unit]
    if not given:
        return [()] * before.layers
    name = given[0].op
    found = Counter(operation.layer for operation in given)
    layers = set(range(before.layers))
    if found != Counter(layers):
        wrong = min(i for i in found.keys() | layers if found[i] != (i in layers))
        raise PlanError(
            f"{name} names layer {wrong} {found[wrong]} times; the model has layers 0 to "
            f"{before.layers - 1}",
            hint=f"give one {name} for every layer, or none",
        )
    for operation in given:
        try:
            operation.check(before)
        except PlanError as error:
            raise PlanError(
                f"{name} of layer {operation.layer}: "
                + (f"{error.option}: " if error.option else "")
                + error.message,
                hint=error.hint or "correct the indices",
            ) from error
    counts = sorted({len(operation.kept) for operation in given})
    if len(counts) > 1 and unit != "channels":
        raise PlanError(
            f"{name} keeps {counts[0]} units in one layer and {counts[-1]} in another",
            hint="keep the same number in every layer: no model runs otherwise",
        )
    by_layer = {operation.layer: set(operation.kept) for operation in given}
    return [
        tuple(i for i in range(before.of_layer(layer).units[unit]) if i not in by_layer[layer])
        for layer in range(before.layers)
    ]


def _refuse_both(removed: Mapping[str, Sequence[tuple[int, ...]]]) -> None:
    """Heads go in one way: indices of query heads would change with the KV groups."""
    if any(removed.get("kv_groups", ())) and any(removed.get("query_heads", ())):
        raise PlanError(
            "keep_heads and keep_query_heads remove from the same attention",
            hint="make it two plans, one per stage",
        )


def _after(removed: Mapping[str, Sequence[tuple[int, ...]]], before: Dimensions) -> Dimensions:
    """Dimensions without the units, whose indices are given for every layer."""
    channels = removed.get("channels", [()] * before.layers)
    left = before.with_widths(
        [size - len(gone) for size, gone in zip(before.widths, channels, strict=True)]
    )
    others = {unit: len(units[0]) for unit, units in removed.items() if unit != "channels"}
    return left.without_units(**others)
