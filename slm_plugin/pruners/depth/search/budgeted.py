"""Choosing runs for an exact number of layers by dynamic programming over all windows.

Every window is tried once, alone. If what windows cost added up, the choice would be the best of
all; it is exact for the sum, and the sum is an approximation, because merged layers meet inputs
that other merges have changed. The trials serve every number of layers.
"""

from __future__ import annotations

import math

from slm_plugin.pruners.depth.search.runs import Found, Measure, Measured, Rules, Run

Window = tuple[int, int]


def budgeted(rules: Rules, measure: Measure, wanted: int, same: float) -> Found:
    """Merge the disjoint windows whose costs have the least sum and take ``wanted`` layers away.

    Args:
        rules: What the search may do.
        measure: Compares the model with a run merged, on top of others, with the original one.
        wanted: Layers to take away.
        same: Value of an unchanged model: a window costs what it stays below this.
    """
    alone: dict[Window, Measured] = {}
    for last in range(rules.top, rules.protect_first, -1):
        for first in range(last - 1, max(rules.protect_first, last - wanted) - 1, -1):
            alone[first, last] = measure(first, last, ())
    cost, windows = least_sum({w: same - tried.value for w, tried in alone.items()}, rules, wanted)
    trials = []
    runs: list[Run] = []
    for first, last in sorted(windows, reverse=True):
        tried = measure(first, last, tuple(runs))
        trials.append(tried.trial(tuple(runs), accepted=True))
        runs.append(tried.run)
    real = same - trials[-1].similarity
    note = (
        f"of all sets of windows that take {wanted} layers away, these have the least sum of "
        f"costs, {cost:.4g}; together they cost {real:.4g}"
    )
    return Found(tuple(runs), tuple(trials), notes=(note,))


def least_sum(costs: dict[Window, float], rules: Rules, wanted: int) -> tuple[float, list[Window]]:
    """The cheapest disjoint windows that take exactly ``wanted`` layers away.

    Args:
        costs: Cost of every window that may be chosen.
        rules: Which layers take part.
        wanted: Layers to take away.

    Returns:
        The sum of the costs and the windows; of equal sums, the one found first from the bottom.
    """
    # best[k]: cheapest way to take k layers away among the layers below the one looked at.
    nothing: tuple[float, list[Window]] = (0.0, [])
    out_of_reach: tuple[float, list[Window]] = (math.inf, [])
    table = [[nothing] + [out_of_reach] * wanted]
    for last in range(rules.protect_first, rules.top + 1):
        row = list(table[-1])
        for size in range(2, wanted + 2):
            first = last - size + 1
            if (first, last) not in costs:
                continue
            below = table[first - rules.protect_first]
            for gone in range(size - 1, wanted + 1):
                total = below[gone - size + 1][0] + costs[first, last]
                if total < row[gone][0]:
                    row[gone] = (total, [*below[gone - size + 1][1], (first, last)])
        table.append(row)
    return table[-1][wanted]
