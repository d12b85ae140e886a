"""Pareto pictures."""

from __future__ import annotations

import math
import re

import pytest

from slm_plugin.comparison.plot import pareto_plot
from slm_plugin.comparison.table import MEAN, PARAMETERS, Column, Row
from tests.report.drawing import SVG, by_id, parse, points, words

pytest.importorskip("matplotlib")

LOSS, ACCURACY, SIZE, SPEED = "perplexity", MEAN, PARAMETERS, "decode speed"


def drawn(*places: tuple[float, float], x: str = SIZE, y: str = LOSS) -> str:
    """The plot of as many methods of one target."""
    rows = [Row(f"method {n}", "", "a target", "", 1) for n in range(len(places))]
    axes = [
        Column(name, "", "lower" if name in (LOSS, SIZE) else "higher", values, str, quality=judged)
        for name, values, judged in zip(
            (x, y), zip(*places, strict=True), (False, True), strict=True
        )
    ]
    return pareto_plot(rows, *axes)


def test_every_point_is_drawn_where_it_belongs() -> None:
    """Larger is further right; on a logarithmic axis equal ratios are equally far apart."""
    svg = drawn((1e8, 10.0), (2e8, 50.0), (3e8, 250.0))
    found = by_id(svg, r"front-point-\d+")
    assert sorted(found) == ["front-point-0", "front-point-1", "front-point-2"]
    places = [
        (float(use.get("x", "nan")), float(use.get("y", "nan")))
        for one in (found[name] for name in sorted(found))
        for use in one.iter(f"{SVG}use")
    ]
    (x0, y0), (x1, y1), (x2, y2) = places
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.01) and x1 > x0
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.01) and y0 > y1
    assert "200.0 M" in words(svg)


@pytest.mark.parametrize(
    ("scale", "corners"), [(SIZE, [(1, 40), (2, 30), (3, 20)]), (SPEED, [(2, 30), (3, 20)])]
)
def test_the_front_is_stairs_through_the_best(
    scale: str, corners: list[tuple[float, float]]
) -> None:
    """A corner at each that nothing beats and one between two of them; what is beaten is off it."""
    places = [(1.0, 40.0), (2.0, 30.0), (2.0, 35.0), (3.0, 20.0), (2.5, 33.0)]
    if scale == SPEED:
        # Fast and good is best: only the rightmost lowest point is unbeaten, so raise it.
        places = [(1.0, 40.0), (2.0, 20.0), (2.0, 35.0), (3.0, 30.0), (2.5, 33.0)]
    (line,) = by_id(drawn(*places, x=scale), "front-line").values()
    assert len(set(points(line))) == 2 * len(corners) - 1


def test_points_are_numbered_and_listed_beside_the_plot() -> None:
    """Every number stands at its point; the list names it below the heading of its target."""
    rows = [Row("dense " + "x" * 90, "", "", "", 0)]
    rows += [Row(name, "refit", "3 layers", "", 1) for name in ("a", "b", "c")]
    x = Column(SIZE, "", "lower", (3e8, 1e8, 1e8, 2e8), str)
    y = Column(MEAN, "", "higher", (5.0, 30.0, 20.0, None), str, quality=True)
    svg = pareto_plot(rows, x, y)
    listed = [text.replace("\N{NO-BREAK SPACE}", " ") for text in words(svg)]
    at = listed.index("3 layers")
    assert listed[at + 1 :][:2] == ["  2 a + refit", "  3 b + refit"]
    dense = listed[at - 1]
    assert dense.startswith("1 dense xxx") and dense.endswith("\N{HORIZONTAL ELLIPSIS}")
    texts = {"".join(t.itertext()): t for t in parse(svg).iter(f"{SVG}text")}
    assert "4" not in texts
    for row in range(3):
        (point,) = by_id(svg, f"front-point-{row}").values()
        (use,) = point.iter(f"{SVG}use")
        spot = re.search(r"([\d.]+)[ ,]([\d.]+)\)", str(texts[str(row + 1)].attrib))
        assert spot is not None
        assert abs(float(spot[1]) - float(use.get("x", "nan"))) < 50
        assert abs(float(spot[2]) - float(use.get("y", "nan"))) < 6


def test_what_cannot_be_drawn_is_left_out() -> None:
    """Infinite perplexities have no place; fewer than two points are no picture."""
    svg = drawn((1.0, math.inf), (1.0, 3.0), (2.0, 2.0))
    assert sorted(by_id(svg, r"front-point-\d+")) == ["front-point-1", "front-point-2"]
    assert drawn((1.0, math.inf), (1.0, 3.0)) == ""


def test_an_outlier_does_not_compress_the_scale() -> None:
    """Thirty times the best perplexity is left out; on an axis that is not logarithmic nothing."""
    outliers = ((1.0, 20.0), (2.0, 599.0), (3.0, 601.0), (4.0, 3e8))
    assert sorted(by_id(drawn(*outliers), r"front-point-\d+")) == ["front-point-0", "front-point-1"]
    assert len(by_id(drawn(*outliers, y=ACCURACY), r"front-point-\d+")) == 4


def test_a_narrow_logarithmic_axis_has_numbers() -> None:
    """Between 41 and 48 lies no 1, 2 or 5 of a decade."""
    said = words(drawn((1.0, 41.0), (2.0, 48.0)))
    assert sum(bool(re.fullmatch(r"4\d(\.\d)?", word)) for word in said) >= 3
