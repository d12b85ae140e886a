"""The Pareto front, against the definition."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from slm_plugin.comparison.pareto import pareto_front

COST = st.integers(0, 6).map(float) | st.sampled_from([math.inf, math.nan])


@given(st.lists(st.tuples(COST, COST), max_size=14))
def test_the_front_holds_what_no_pair_dominates(costs: list[tuple[float, float]]) -> None:
    """Every pair against every other: on it is each finite one that none dominates."""

    def dominated(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return other[0] <= one[0] and other[1] <= one[1] and other != one

    expected = {
        index
        for index, one in enumerate(costs)
        if math.isfinite(one[0])
        and math.isfinite(one[1])
        and not any(dominated(one, other) for other in costs)
    }
    found = pareto_front(costs)
    assert set(found) == expected
    assert len(found) == len(expected)
    assert [costs[i][0] for i in found] == sorted(costs[i][0] for i in found)
