"""One figure a layer: bars as high as their values, lines on a logarithmic scale."""

from __future__ import annotations

import math

import pytest

from slm_plugin.report.pictures import influences, profiles
from tests.report.pictures.drawing import box, by_id, points, words

pytest.importorskip("matplotlib")


def test_bars_are_as_high_as_the_influence() -> None:
    """A layer that changes half as much has half the bar; none has no bar."""
    bars = by_id(influences([0.8, 0.4, 0.0]), r"influences-layer-\d+")
    assert list(bars) == [f"influences-layer-{layer}" for layer in range(3)]
    high = [box(bar)[3] - box(bar)[1] for bar in bars.values()]
    assert high[1] == pytest.approx(high[0] / 2, rel=1e-3)
    assert high[2] == pytest.approx(0, abs=1e-6)


def test_norms_stand_on_a_logarithmic_scale() -> None:
    """Ten times the norm is one step up, wherever it starts, and the ticks are plain numbers."""
    svg = profiles({"mean": [1, 10, 100], "median": [2, 2, 2]}, "norms", "norm")
    line = by_id(svg, "norms-line-1")["norms-line-1"]
    heights = [y for _, y in points(line)[:3]]
    assert heights[0] - heights[1] == pytest.approx(heights[1] - heights[2], rel=1e-3)
    assert {"mean", "median", "1", "10", "100"} <= set(words(svg))
    assert not any("$" in word for word in words(svg))


def test_a_norm_of_zero_leaves_a_gap() -> None:
    """Identity layers add nothing; a logarithmic scale has no place for it."""
    svg = profiles({"added": [3, 0, 3]}, "norms", "norm")
    line = by_id(svg, "norms-line-1")["norms-line-1"]
    assert all(math.isfinite(part) for point in points(line) for part in point)
