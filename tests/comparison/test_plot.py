"""Pareto pictures."""

from __future__ import annotations

import math
import re

import pytest

from slm_plugin.comparison.plot import Point, Scale, pareto_plot
from tests.report.drawing import SVG, by_id, parse, points, words

pytest.importorskip("matplotlib")

SIZE = Scale("parameters", "lower", counts=True)
LOSS = Scale("perplexity", "lower", log=True)
SPEED = Scale("decode speed", "higher")
ACCURACY = Scale("zero-shot mean", "higher")


def cloud(*places: tuple[float, float]) -> list[Point]:
    """Points with labels of their own."""
    return [Point(n, f"method {n}", "as pruned", x, y) for n, (x, y) in enumerate(places)]


def test_every_point_is_drawn_where_it_belongs() -> None:
    """Larger is further right; on a logarithmic axis equal ratios are equally far apart."""
    svg = pareto_plot(cloud((1e8, 10.0), (2e8, 50.0), (3e8, 250.0)), SIZE, LOSS)
    drawn = by_id(svg, r"front-point-\d+")
    assert list(drawn) == ["front-point-0", "front-point-1", "front-point-2"]
    places = [
        (float(use.get("x", "nan")), float(use.get("y", "nan")))
        for one in drawn.values()
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
    scale: Scale, corners: list[tuple[float, float]]
) -> None:
    """A corner at each that nothing beats and one between two of them; what is beaten is off it."""
    places = [(1.0, 40.0), (2.0, 30.0), (2.0, 35.0), (3.0, 20.0), (2.5, 33.0)]
    if scale is SPEED:
        # Fast and good is best: only the rightmost lowest point is unbeaten, so raise it.
        places = [(1.0, 40.0), (2.0, 20.0), (2.0, 35.0), (3.0, 30.0), (2.5, 33.0)]
    (line,) = by_id(pareto_plot(cloud(*places), scale, LOSS), "front-line").values()
    assert len(set(points(line))) == 2 * len(corners) - 1


def test_points_are_numbered_and_listed_beside_the_plot() -> None:
    """Every number stands at its point; the list names it below the heading of its target."""
    points = cloud((1e8, 30.0), (1e8, 20.0), (2e8, 10.0))
    points += [Point(7, "dense " + "x" * 90, "", 3e8, 5.0)]
    svg = pareto_plot(points, SIZE, ACCURACY)
    listed = [text.replace("\N{NO-BREAK SPACE}", " ") for text in words(svg)]
    at = listed.index("as pruned")
    assert listed[at + 1 : at + 4] == ["  1 method 0", "  2 method 1", "  3 method 2"]
    (dense,) = (text for text in listed if text.startswith("8 dense"))
    assert len(dense) == 36 and dense.endswith("\N{HORIZONTAL ELLIPSIS}")
    places = {"".join(t.itertext()): t for t in parse(svg).iter(f"{SVG}text")}
    for point in points:
        (use,) = by_id(svg, f"front-point-{point.row}")[f"front-point-{point.row}"].iter(
            f"{SVG}use"
        )
        spot = re.search(r"([\d.]+)[ ,]([\d.]+)\)", str(places[str(point.row + 1)].attrib))
        assert spot is not None
        assert abs(float(spot[1]) - float(use.get("x", "nan"))) < 12
        assert abs(float(spot[2]) - float(use.get("y", "nan"))) < 6


def test_what_cannot_be_drawn_is_left_out() -> None:
    """Infinite perplexities have no place; fewer than two points are no picture."""
    svg = pareto_plot(cloud((1.0, math.inf), (1.0, 3.0), (2.0, 2.0)), SIZE, LOSS)
    assert sorted(by_id(svg, r"front-point-\d+")) == ["front-point-1", "front-point-2"]
    assert pareto_plot(cloud((1.0, math.inf), (1.0, 3.0)), SIZE, LOSS) == ""


def test_an_outlier_does_not_compress_the_scale() -> None:
    """Thirty times the best perplexity is left out; on an axis that is not logarithmic nothing."""
    outliers = cloud((1.0, 20.0), (2.0, 599.0), (3.0, 601.0), (4.0, 3e8))
    drawn = list(by_id(pareto_plot(outliers, SIZE, LOSS), r"front-point-\d+"))
    assert drawn == ["front-point-0", "front-point-1"]
    assert len(by_id(pareto_plot(outliers, SIZE, SPEED), r"front-point-\d+")) == 4


def test_a_narrow_logarithmic_axis_has_numbers() -> None:
    """Between 41 and 48 lies no 1, 2 or 5 of a decade."""
    said = words(pareto_plot(cloud((1.0, 41.0), (2.0, 48.0)), SIZE, LOSS))
    assert sum(bool(re.fullmatch(r"4\d(\.\d)?", word)) for word in said) >= 3
