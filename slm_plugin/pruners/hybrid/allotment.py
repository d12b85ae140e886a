"""What a budget leaves to layers of different widths, by the number of layers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from slm_plugin.pruners.hybrid.budget import Budget
from slm_plugin.pruners.hybrid.range import Range, least_cost, out_of_reach, too_little
from slm_plugin.pruners.hybrid.shapes import MixedShape, Shape


@dataclass(frozen=True, slots=True)
class Allotment:
    """How many MLP channels all layers may keep together.

    Attributes:
        removed: Number of removed layers.
        least: Fewest channels of those that are left.
        most: Most channels of those.
    """

    removed: int
    least: int
    most: int


def allotments(budget: Budget, sizes: Range) -> list[Allotment]:
    """For every number of layers, the channels that meet a budget, fewest layers removed first.

    The costs of a shape are linear in its layers and in the sum of its channels, so a budget is a
    bound on that sum. A size is met to half a step of one layer; where it lies between all shapes,
    the nearest one is the only candidate. The model as it is meets none.

    Args:
        budget: What a shape may cost.
        sizes: The sizes among which every layer may choose.

    Raises:
        TargetError: The model is within the budget already, or no shape is, or the model itself
            comes nearer to it than every smaller shape.
    """
    least, largest = least_cost(budget, sizes), max(_largest(budget, sizes))
    if not budget.limit and 2 * budget.allowed > budget.dense + largest:
        raise too_little(budget, largest)
    found = [one for one in _allotments(budget, sizes) if one.least <= one.most]
    if not found and budget.allowed < least:
        raise out_of_reach(budget, least)
    return found or [_between(budget, sizes)]


def _allotments(budget: Budget, sizes: Range) -> Iterator[Allotment]:
    for removed in range(sizes.layers_removed + 1):
        narrow, whole = _ends(removed, sizes)
        low, high = budget.cost(narrow), budget.cost(whole)
        if high > low:
            per_channel = (high - low) / (whole.channels - narrow.channels)
            ideal = narrow.channels + (budget.allowed - low) / per_channel
            yield _around(ideal, removed, sizes, limit=budget.limit)
        elif budget.limit and high <= budget.allowed:
            yield Allotment(removed, whole.channels, whole.channels)
        # With fewer layers, a part of the budget stays unused.
        if high <= budget.allowed:
            break


def _around(ideal: float, removed: int, sizes: Range, *, limit: bool) -> Allotment:
    """The sums that a budget allows, of which one would use it whole."""
    step = max(wide - narrow for wide, narrow in pairwise(sizes.widths))
    low, high = ideal - step / 2, ideal + step / 2
    least = _ends(removed, sizes)[0].channels
    most = math.floor(ideal if limit else high)
    return Allotment(
        removed, least if limit else max(least, math.ceil(low)), min(most, _most(removed, sizes))
    )


def _ends(removed: int, sizes: Range) -> tuple[Shape, Shape]:
    """The narrowest and the widest shape without so many layers."""
    layers, groups = sizes.dense.layers - removed, sizes.dense.kv_heads
    return Shape(layers, sizes.widths[-1], groups), Shape(layers, sizes.widths[0], groups)


def _most(removed: int, sizes: Range) -> int:
    """Most channels without so many layers; with all layers one step less than the model's."""
    whole = _ends(removed, sizes)[1].channels
    return whole if removed else whole - sizes.widths[0] + sizes.widths[1]


def _between(budget: Budget, sizes: Range) -> Allotment:
    """The end of the sums nearest to a budget that lies between them."""
    ends = [
        (removed, end)
        for removed in range(sizes.layers_removed + 1)
        for end in _ends(removed, sizes)
        if end != Shape.of(sizes.dense)
    ]
    removed, nearest = min(ends, key=lambda one: abs(budget.cost(one[1]) - budget.allowed))
    return Allotment(removed, nearest.channels, nearest.channels)


def _largest(budget: Budget, sizes: Range) -> Iterator[float]:
    """Costs of the largest shapes below the model: one layer narrower, and one fewer."""
    dense, (whole, *narrower) = sizes.dense, sizes.widths
    if narrower:
        widths = (whole,) * (dense.layers - 1)
        yield budget.cost(MixedShape((*widths, narrower[0]), dense.kv_heads))
    if sizes.layers_removed:
        yield budget.cost(_ends(1, sizes)[1])
