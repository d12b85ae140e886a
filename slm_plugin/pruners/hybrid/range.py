"""The shapes among which a planner chooses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from slm_plugin.errors import TargetError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.pruners.hybrid.budget import Budget
from slm_plugin.pruners.hybrid.shapes import Shape
from slm_plugin.pruners.width.reach import sizes
from slm_plugin.surgery.portability import splits_evenly

# The smallest shape keeps this share of the layers and of the MLP channels. The loss of smaller
# ones is too far from the measured ones to be predicted.
LEAST_LAYERS = 0.5
LEAST_CHANNELS = 0.25


@dataclass(frozen=True, slots=True)
class Range:
    """The sizes among which a planner chooses.

    Attributes:
        dense: The model as it is.
        layers_removed: Most layers that may go.
        kv_groups: Numbers of KV groups that a layer may keep, most first.
        multiple_of: A smaller number of MLP channels is a multiple of this.
    """

    dense: Dimensions
    layers_removed: int
    kv_groups: Sequence[int]
    multiple_of: int

    @classmethod
    def of(cls, dense: Dimensions, removable: int, *, kv_groups: bool, multiple_of: int) -> Range:
        """The range of a model.

        Args:
            dense: The model as it is.
            removable: Layers that are not protected.
            kv_groups: KV groups may be removed.
            multiple_of: A smaller number of MLP channels is a multiple of this.
        """
        groups = [dense.kv_heads]
        if kv_groups and dense.kv_group_parameters:
            groups += [
                dense.kv_heads - gone
                for gone in range(1, dense.kv_heads)
                if splits_evenly(dense.without_units(kv_groups=gone))
            ]
        most = int((1 - LEAST_LAYERS) * dense.layers)
        return cls(dense, min(removable, most), groups, multiple_of)

    @property
    def widths(self) -> list[int]:
        """Numbers of MLP channels, most first."""
        least = LEAST_CHANNELS * self.dense.intermediate_size
        return [size for size in sizes(self.dense, self.multiple_of) if size >= least]

    @property
    def smallest(self) -> Shape:
        """The smallest shape."""
        layers = self.dense.layers - self.layers_removed
        return Shape(layers, self.widths[-1], self.kv_groups[-1])


def shapes_within(budget: Budget, sizes: Range) -> list[Shape]:
    """For every number of layers and KV groups, the widest shape that the budget allows.

    Shapes that leave more of the budget unused than one step in width are left out, unless there
    are no others, and so is the model as it is.

    Raises:
        TargetError: The model is within the budget already, or no shape is, or the model itself
            comes nearer to it than every smaller shape.
    """
    least = least_cost(budget, sizes)
    whole = Shape.of(sizes.dense)
    found = [shape for shape in _shapes(budget, sizes) if shape != whole]
    if not found and budget.allowed < least:
        raise out_of_reach(budget, least)
    return found or [_between(budget, sizes)]


def least_cost(budget: Budget, sizes: Range) -> float:
    """The cost of the smallest shape.

    Raises:
        TargetError: The model is within the budget already, or no shape costs less than it.
    """
    if budget.allowed >= budget.dense:
        raise TargetError(
            f"the target ({budget.target.describe()}) removes nothing: the model has "
            f"{budget.said(budget.dense)}",
            hint="ask for less than that",
        )
    least = budget.cost(sizes.smallest)
    if least >= budget.dense:
        raise TargetError(
            f"no shape meets the target ({budget.target.describe()}): the smallest that may be "
            f"chosen has as many {budget.unit} as the model",
            hint="protect fewer layers, choose a smaller `multiple_of`, or another target",
        )
    return least


def out_of_reach(budget: Budget, least: float) -> TargetError:
    """The smallest shape, whose cost is given, exceeds the budget."""
    return TargetError(
        f"no shape meets the target ({budget.target.describe()}): of those with at least "
        f"{LEAST_LAYERS:.0%} of the layers and {LEAST_CHANNELS:.0%} of the MLP channels, the "
        f"smallest has {budget.said(least)}, {least / budget.dense:.1%} of the model's",
        hint=_nearest(budget, least),
    )


def too_little(budget: Budget, largest: float) -> TargetError:
    """The model comes nearer to the target than the largest shape below it, of the given cost."""
    return TargetError(
        f"the target ({budget.target.describe()}) is less than half of the smallest step: the "
        f"largest shape below the model has {budget.said(largest)}, "
        f"{largest / budget.dense:.1%} of the model's",
        hint=f"ask for `parameters: {int(largest)}` or less, or choose a smaller `multiple_of`",
    )


def _between(budget: Budget, sizes: Range) -> Shape:
    """The shape nearest to a budget that lies between the shapes.

    Raises:
        TargetError: It is the model as it is.
    """
    whole = Shape.of(sizes.dense)
    shapes = [
        Shape(sizes.dense.layers - removed, width, kv_groups)
        for removed in range(sizes.layers_removed + 1)
        for width in sizes.widths
        for kv_groups in sizes.kv_groups
    ]
    nearest = min(shapes, key=lambda shape: abs(budget.cost(shape) - budget.allowed))
    if nearest != whole:
        return nearest
    largest = max(cost for cost in map(budget.cost, shapes) if cost < budget.dense)
    raise too_little(budget, largest)


def _nearest(budget: Budget, least: float) -> str:
    """What to ask for instead."""
    kind, target = budget.target.kind, budget.target
    if kind == "latency" and target.latency is not None:
        share = math.ceil(least / budget.whole * 1000) / 1000
        if share >= 1:
            return "no share of the time below 1 can be reached; ask for another target"
        return f"ask for `latency: {{{target.latency.phase}: {share:.3f}}}` or more"
    if kind == "ratio":
        ratio = math.floor((budget.dense - least) / budget.whole * 1000) / 1000
        return f"ask for `ratio: {ratio:.3f}` or less"
    return f"ask for `{kind}: {math.ceil(least)}` or more"


def _shapes(budget: Budget, sizes: Range) -> Iterator[Shape]:
    widths = sizes.widths
    for kv_groups in sizes.kv_groups:
        for removed in range(sizes.layers_removed + 1):
            layers = sizes.dense.layers - removed
            costs = [budget.cost(Shape(layers, width, kv_groups)) for width in widths]
            place = _place(costs, budget)
            if place is not None:
                yield Shape(layers, widths[place], kv_groups)
            # With fewer layers, a part of the budget stays unused at any width.
            if costs[0] <= budget.allowed:
                break


def _place(costs: Sequence[float], budget: Budget) -> int | None:
    """The width that meets a budget, by the costs of all widths, greatest first."""
    if budget.limit:
        fitting = [place for place, cost in enumerate(costs) if cost <= budget.allowed]
        return fitting[0] if fitting else None
    nearest = min(range(len(costs)), key=lambda place: abs(costs[place] - budget.allowed))
    # Steps differ: the first is what exceeds a multiple.
    neighbours = [costs[place] for place in (nearest - 1, nearest + 1) if 0 <= place < len(costs)]
    step = max((abs(costs[nearest] - cost) for cost in neighbours), default=0.0)
    return nearest if abs(costs[nearest] - budget.allowed) <= step / 2 + 1 else None
