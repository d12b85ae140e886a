"""Choice of windows for an exact number of layers by dynamic programming.

Every window is tried once, alone. The choice minimises the sum of the windows' costs exactly. The
sum approximates the joint cost, because merges change the inputs of other windows. The same trials
serve every number of layers.
"""

from __future__ import annotations

import math

from slm_plugin.pruners.depth.search.runs import Found, Measure, Measured, Rules, Run

Window = tuple[int, int]


def budgeted(rules: Rules, measure: Measure, wanted: int, same: float) -> Found:
    """Merge the disjoint windows of least total cost that remove ``wanted`` layers.

    Args:
        rules: The layers that may merge.
        measure: Compares the merged model with the original one.
        wanted: Number of layers to remove.
        same: Value of an unchanged model; the cost of a window is the difference from it.
    """
    alone: dict[Window, Measured] = {}
    for last in range(rules.top, rules.protect_first, -1):
        for first in range(last - 1, max(rules.protect_first, last - wanted) - 1, -1):
            if rules.alike(first, last):
                alone[first, last] = measure(first, last, ())
    cost, windows = least_sum({w: same - tried.value for w, tried in alone.items()}, rules, wanted)
    trials = []
    runs: list[Run] = []
    for first, last in sorted(windows, reverse=True):
        tried = measure(first, last, tuple(runs))
        trials.append(tried.trial(tuple(runs), accepted=True))
        runs.append(tried.run)
    joint = same - trials[-1].similarity
    note = (
        f"of all sets of windows that remove {wanted} layers, these have the least sum of "
        f"costs, {cost:.4g}; their joint cost is {joint:.4g}"
    )
    return Found(tuple(runs), tuple(trials), notes=(note,))


def least_sum(costs: dict[Window, float], rules: Rules, wanted: int) -> tuple[float, list[Window]]:
    """The disjoint windows of least total cost that remove exactly ``wanted`` layers.

    Args:
        costs: Cost of every candidate window.
        rules: The layers that may merge.
        wanted: Number of layers to remove.

    Returns:
        The total cost and the windows; ties by the lowest windows.
    """
    # row[k]: the cheapest windows that remove k layers, among the layers up to `last`.
    empty: tuple[float, list[Window]] = (0.0, [])
    out_of_reach: tuple[float, list[Window]] = (math.inf, [])
    table = [[empty] + [out_of_reach] * wanted]
    for last in range(rules.protect_first, rules.top + 1):
        row = list(table[-1])
        for size in range(2, wanted + 2):
            first = last - size + 1
            if (first, last) not in costs:
                continue
            below = table[first - rules.protect_first]
            for count in range(size - 1, wanted + 1):
                total = below[count - size + 1][0] + costs[first, last]
                if total < row[count][0]:
                    row[count] = (total, [*below[count - size + 1][1], (first, last)])
        table.append(row)
    return table[-1][wanted]
