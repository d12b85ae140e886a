"""The Pareto front of two costs."""

from __future__ import annotations

import math
from collections.abc import Sequence


def pareto_front(costs: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the Pareto front, in ascending order of the first cost.

    It holds the pairs that no other pair dominates, that is, none is as low in both costs and lower
    in one. Equal pairs are on it together. Pairs with NaN or infinity are never on it.

    Args:
        costs: Pairs of costs; lower is better.
    """
    ranked = sorted(
        (index for index, pair in enumerate(costs) if all(map(math.isfinite, pair))),
        key=lambda index: costs[index],
    )
    found: list[int] = []
    for index in ranked:
        if not found or costs[index][1] < costs[found[-1]][1] or costs[index] == costs[found[-1]]:
            found.append(index)
    return found
