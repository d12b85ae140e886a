"""The plot of the search: bars at the layers of the trials."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest

from slm_plugin.plans import PruningPlan, Trial
from slm_plugin.report.pictures import canvas, similarities, walk
from tests.report import sample_plans
from tests.report.pictures.drawing import box, by_id, points, style, words

pytest.importorskip("matplotlib")


def test_every_trial_is_exactly_one_bar_in_its_row() -> None:
    """Bars are numbered from 1, one below the other, evenly."""
    plan = sample_plans.depth_plan()
    bars = by_id(walk(plan), r"walk-trial-\d+")
    assert list(bars) == [f"walk-trial-{n}" for n in range(1, len(plan.trials) + 1)]
    middles = [(box(bar)[1] + box(bar)[3]) / 2 for bar in bars.values()]
    steps = [b - a for a, b in pairwise(middles)]
    assert min(steps) > 10
    assert max(steps) == pytest.approx(min(steps), abs=1e-3)


def test_a_bar_spans_its_layers() -> None:
    """On the scale of the axis, edges lie 0.4 of a layer beyond the first and the last layer."""
    plan = sample_plans.depth_plan()
    svg = walk(plan)
    ticks = {
        int("".join(tick.itertext()).strip()): points(tick)[-1][0]
        for tick in by_id(svg, r"walk-xtick_\d+").values()
        if "".join(tick.itertext()).strip().isdigit()
    }
    unit = (ticks[25] - ticks[0]) / 25
    bars = [box(bar) for bar in by_id(svg, r"walk-trial-\d+").values()]
    for trial, (left, _, right, _) in zip(plan.trials, bars, strict=True):
        assert left == pytest.approx(ticks[0] + unit * (trial.first - 0.4), abs=0.02)
        assert right == pytest.approx(ticks[0] + unit * (trial.last + 0.4), abs=0.02)


def test_bars_tell_rejected_accepted_and_merged_apart() -> None:
    """Dark for the windows of the plan, light for those on the way, hatched for the rest."""
    plan = sample_plans.depth_plan()
    bars = list(by_id(walk(plan), r"walk-trial-\d+").values())
    merged = {(24, 26), (17, 18)}
    for trial, bar in zip(plan.trials, bars, strict=True):
        look = style(bar).lower()
        if not trial.accepted:
            assert "url(#" in look
        elif (trial.first, trial.last) in merged:
            assert canvas.BLUE.lower() in look.split("stroke")[0]
        else:
            assert canvas.SKY.lower() in look.split("stroke")[0]


def test_similarities_are_written_beside_the_bars() -> None:
    """Each with four digits, in order, and the threshold above its line."""
    plan = sample_plans.depth_plan()
    svg = walk(plan)
    written = [text for text in words(svg) if len(text) == 6 and text.startswith("0.")]
    assert written == [f"{trial.similarity:.4f}" for trial in plan.trials]
    assert "threshold 0.9" in words(svg)
    assert len(by_id(svg, "walk-threshold")) == 1


def test_points_stand_at_their_similarity() -> None:
    """Heights of all points are one linear function of the similarities."""
    plan = sample_plans.depth_plan()
    found = by_id(similarities(plan), r"similarities-trial-\d+")
    assert len(found) == len(plan.trials)
    heights = [marker(point)[1] for point in found.values()]
    values = [trial.similarity for trial in plan.trials]
    low, high = values.index(min(values)), values.index(max(values))
    scale = (heights[high] - heights[low]) / (values[high] - values[low])
    assert scale < 0
    for value, height in zip(values, heights, strict=True):
        assert height == pytest.approx(heights[low] + scale * (value - values[low]), abs=0.02)


def marker(element: object) -> tuple[float, float]:
    """Where the one marker inside an element is placed."""
    (use,) = (part for part in element.iter() if part.tag.endswith("}use"))  # type: ignore[attr-defined]
    return float(use.get("x")), float(use.get("y"))


def test_a_plan_without_trials_has_no_walk() -> None:
    """There is nothing to draw."""
    plan = sample_plans.dropping_plan()
    assert walk(plan) == similarities(plan) == ""


def test_dropped_layers_are_not_called_merged() -> None:
    """A search that drops layers says so in its legend and beside its points."""
    plan = sample_plans.searching_plan()
    bars, costs = words(walk(plan)), words(similarities(plan))
    assert "accepted, dropped by the plan" in bars and "dropped before" in bars
    assert {"dropped 20", "dropped 9"} <= set(costs)
    assert not any("merged" in text for text in (*bars, *costs))


def trials_of(*values: float) -> PruningPlan:
    """A plan whose trials had these similarities, without a threshold."""
    trials = [
        Trial(first=n, last=n + 1, similarity=value, accepted=False)
        for n, value in enumerate(values)
    ]
    return sample_plans.depth_plan(trials=tuple(trials), operations=(), threshold=None)


@pytest.mark.parametrize("values", [(0.5,), (0.5, 0.5), (math.nan, 0.5), (math.nan,), (-3.0, -1.0)])
def test_odd_similarities_are_drawn(values: tuple[float, ...]) -> None:
    """One value, equal ones, NaN and negative ones make no empty or broken scale."""
    plan = trials_of(*values)
    assert len(by_id(walk(plan), r"walk-trial-\d+")) == len(values)
    assert len(by_id(similarities(plan), r"similarities-trial-\d+")) == len(values)


def test_sixty_trials_keep_rows_high_enough_to_read() -> None:
    """The sheet grows with the trials."""
    plan = trials_of(*[0.5 + 0.005 * n for n in range(29)] * 2)
    bars = [box(bar) for bar in by_id(walk(plan), r"walk-trial-\d+").values()]
    assert len(bars) == 58
    assert bars[1][1] - bars[0][1] > 10
