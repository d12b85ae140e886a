"""Which of many are best, when two things count at once."""

from __future__ import annotations

import math
from collections.abc import Sequence


def front(costs: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the Pareto front, by rising first cost.

    On it is what nothing else beats: no other is as good in both costs and better in one. Equals
    are on it together; what has a cost that is NaN or infinite is never on it.

    Args:
        costs: Two numbers each, lower is better.
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
