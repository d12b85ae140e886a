"""Figures before and after, and losses."""

from __future__ import annotations

import math

import pytest

from slm_plugin.recovery.base import RecoveryRecord
from slm_plugin.report.pictures import before_after, losses
from slm_plugin.report.record import RunReport
from tests.report import samples
from tests.report.pictures.drawing import SVG, by_id, points, words

pytest.importorskip("matplotlib")


def test_every_figure_of_both_states_has_a_chart(report: RunReport) -> None:
    """A chart each, with its name, its unit and its values; one-sided figures have none."""
    first, *rest = report.states
    alone = first.measurements[0].model_copy(update={"name": "only before"})
    state = first.model_copy(update={"measurements": (*first.measurements, alone)})
    svg = before_after(report.model_copy(update={"states": (state, *rest)}))
    assert len(by_id(svg, r"before-after-chart-\d+")) == 6
    said = words(svg)
    for measurement in first.measurements:
        assert measurement.name in said
    assert "only before" not in said
    for value in ("33.91", "52.91", "98.35", "61.72", "0.6850", "538.1 MB", "430.9 MB"):
        assert value in said
    assert any(text.startswith("ms, ") and text.endswith("lower is better") for text in said)


def test_bars_are_as_long_as_their_values() -> None:
    """From zero: a bar of twice the value is twice as long."""
    report = samples.make_report()
    states = (report.states[0], report.states[-1])
    pairs = []
    for state, value in zip(states, (10.0, 20.0), strict=True):
        figure = state.measurements[0].model_copy(update={"value": value})
        pairs.append(state.model_copy(update={"measurements": (figure,)}))
    svg = before_after(report.model_copy(update={"states": tuple(pairs)}))
    (chart,) = by_id(svg, r"before-after-chart-\d+").values()
    filled = [
        p
        for p in chart.iter(f"{SVG}path")
        if "fill: #" in p.get("style", "") and "clip-path" in p.attrib
    ]
    lengths = []
    for path in filled:
        xs = [x for x, _ in points(path)]
        lengths.append(max(xs) - min(xs))
    assert len(lengths) == 2
    assert lengths[1] == pytest.approx(2 * lengths[0], rel=1e-3)


@pytest.mark.parametrize(
    "values", [(33.0, math.inf), (0.0, 0.0), (-1.5, -0.5), (math.inf, math.nan)]
)
def test_odd_values_are_drawn(values: tuple[float, float]) -> None:
    """Infinity, zero and negative values are written even where no bar can be drawn."""
    report = samples.make_report()
    states = []
    for state, value in zip((report.states[0], report.states[-1]), values, strict=True):
        figure = state.measurements[0].model_copy(update={"value": value})
        states.append(state.model_copy(update={"measurements": (figure,)}))
    svg = before_after(report.model_copy(update={"states": tuple(states)}))
    assert "nan" not in svg.lower().replace(">nan<", "")
    assert len(by_id(svg, r"before-after-chart-\d+")) == 1


def test_long_names_stay_in_their_chart(report: RunReport) -> None:
    """A name that would run into the next chart ends in an ellipsis."""
    first, *middle, last = report.states
    long = [
        state.model_copy(
            update={"measurements": (state.measurements[0].model_copy(update={"name": "m" * 90}),)}
        )
        for state in (first, last)
    ]
    svg = before_after(report.model_copy(update={"states": (long[0], *middle, long[1])}))
    (name,) = (text for text in words(svg) if text.startswith("mmm"))
    assert len(name) == 36 and name.endswith("\N{HORIZONTAL ELLIPSIS}")


def test_nothing_in_common_is_no_picture() -> None:
    """One state, or other protocols after, leave nothing to compare."""
    report = samples.make_report()
    assert before_after(report.model_copy(update={"states": report.states[:1]})) == ""


def test_losses_are_a_curve_of_all_steps() -> None:
    """As many points as losses; fewer than two are no curve."""
    record = RecoveryRecord(recovery="lora", options={}, losses=(3.0, 2.0, 2.5, 1.0))
    (curve,) = by_id(losses(record), "losses-curve").values()
    assert len(points(curve)) == 4
    assert losses(record.model_copy(update={"losses": (1.0,)})) == ""
