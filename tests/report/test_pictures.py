"""The four pictures of a run: everything in them stands where its number says."""

from __future__ import annotations

import math
import re

import pytest

from slm_plugin.plans import DropLayers, KeepChannels, LayerScores, PruningPlan, Trial
from slm_plugin.report import canvas, pictures
from slm_plugin.report.plan_effects import layer_mapping
from slm_plugin.report.record import RunReport
from tests.report import sample_plans, samples
from tests.report.drawing import SVG, box, by_id, parse, points, style, words

pytest.importorskip("matplotlib")


def test_every_original_layer_has_exactly_one_line() -> None:
    """Kept, merged or dropped: no layer is left out and none drawn twice."""
    lines = by_id(pictures.layer_mapping(sample_plans.dropping_plan()), r"mapping-layer-\d+")
    assert list(lines) == [f"mapping-layer-{layer}" for layer in range(30)]


def test_lines_lead_from_a_layer_to_its_home() -> None:
    """Each starts below the number of its layer and ends above that of its home, or in the air."""
    plan = sample_plans.dropping_plan()
    svg = pictures.layer_mapping(plan)
    numbers = [t for t in parse(svg).iter(f"{SVG}text") if "".join(t.itertext()).isdigit()]
    height = {float(t.get("y", "nan")) for t in numbers}
    assert len(height) == 2
    above, below = (
        {
            int("".join(t.itertext())): float(t.get("x", "nan"))
            for t in numbers
            if float(t.get("y", "nan")) == row
        }
        for row in sorted(height)
    )
    homes = layer_mapping(plan)
    assert homes.count(4) == 3 and homes.count(None) == 2
    lines = [points(line) for line in by_id(svg, r"mapping-layer-\d+").values()]
    floor = max(line[-1][1] for line in lines)
    for layer, (home, line) in enumerate(zip(homes, lines, strict=True)):
        (start_x, start_y), (end_x, end_y) = line
        assert start_x == pytest.approx(above[layer], abs=0.02)
        if home is None:
            assert end_x == start_x and start_y < end_y < floor - 10
        else:
            assert end_x == pytest.approx(below[home], abs=0.02)
            assert end_y == pytest.approx(floor, abs=0.01)


def test_both_rows_are_numbered() -> None:
    """Thirty numbers above, as many as are left below."""
    written = [
        text
        for text in words(pictures.layer_mapping(sample_plans.dropping_plan()))
        if text.isdigit()
    ]
    assert sorted(map(int, written)) == sorted([*range(30), *range(26)])


def test_a_deep_model_is_numbered_sparsely() -> None:
    """At 80 layers every fifth number is written, and every line is still there."""
    before = sample_plans.ORIGINAL.model_copy(update={"layers": 80})
    svg = pictures.layer_mapping(sample_plans.depth_plan(before=before))
    numbers = [int(text) for text in words(svg) if text.isdigit()]
    assert numbers and all(number % 5 == 0 for number in numbers)
    assert len(by_id(svg, r"mapping-layer-\d+")) == 80


def test_a_plan_that_drops_everything_but_one_is_drawn() -> None:
    """The result may be a single layer."""
    plan = sample_plans.depth_plan(operations=(DropLayers(indices=tuple(range(1, 30))),))
    assert len(by_id(pictures.layer_mapping(plan), r"mapping-layer-\d+")) == 30


def test_a_trial_is_a_line_over_its_layers_at_its_similarity() -> None:
    """On the scale of the axes: edges 0.4 of a layer outside, heights linear in the similarity."""
    plan = sample_plans.depth_plan()
    svg = pictures.layer_scores(plan)
    found = by_id(svg, r"scores-trial-\d+")
    assert sorted(found) == sorted(f"scores-trial-{n + 1}" for n in range(len(plan.trials)))
    ticks = {
        int("".join(tick.itertext()).strip()): points(tick)[-1][0]
        for tick in by_id(svg, r"scores-xtick_\d+").values()
    }
    unit = (ticks[25] - ticks[0]) / 25
    boxes = [box(found[f"scores-trial-{n + 1}"]) for n in range(len(plan.trials))]
    values = [trial.similarity for trial in plan.trials]
    low, high = values.index(min(values)), values.index(max(values))
    scale = (boxes[high][1] - boxes[low][1]) / (values[high] - values[low])
    assert scale < 0
    for trial, (left, top, right, bottom) in zip(plan.trials, boxes, strict=True):
        assert left == pytest.approx(ticks[0] + unit * (trial.first - 0.4), abs=0.02)
        assert right == pytest.approx(ticks[0] + unit * (trial.last + 0.4), abs=0.02)
        above = scale * (trial.similarity - values[low])
        assert top == bottom == pytest.approx(boxes[low][1] + above, abs=0.02)


def test_trials_tell_rejected_accepted_and_planned_apart() -> None:
    """By the windows of the plan; the threshold is a line, and all are in the legend."""
    plan = sample_plans.depth_plan()
    svg = pictures.layer_scores(plan)
    found = by_id(svg, r"scores-trial-\d+")
    for number, trial in enumerate(plan.trials, start=1):
        planned = (trial.first, trial.last) in {(24, 26), (17, 18)}
        accepted = canvas.BLUE if planned else canvas.SKY
        colour = accepted if trial.accepted else canvas.VERMILION
        assert colour.lower() in style(found[f"scores-trial-{number}"]).lower()
    assert len(by_id(svg, "scores-threshold")) == 1
    assert {"rejected", "accepted", "in the plan", "threshold 0.9"} <= set(words(svg))


def test_without_trials_the_scores_of_the_layers_are_bars() -> None:
    """As high as the scores, in the colour of what became of the layer; with neither no picture."""
    plan = sample_plans.dropping_plan()
    assert pictures.layer_scores(plan) == ""
    scores = LayerScores(meaning="distance", scores=(*[1.0] * 9, 0.5, math.nan, *[1.0] * 19))
    bars = by_id(
        pictures.layer_scores(plan.model_copy(update={"layer_scores": scores})),
        r"scores-layer-\d+",
    )
    assert list(bars) == [f"scores-layer-{layer}" for layer in range(30) if layer != 10]
    high = {name: box(bar)[3] - box(bar)[1] for name, bar in bars.items()}
    assert high["scores-layer-9"] == pytest.approx(high["scores-layer-0"] / 2, rel=1e-3)
    changed = {name for name, bar in bars.items() if canvas.VERMILION.lower() in style(bar)}
    assert changed == {f"scores-layer-{layer}" for layer in (4, 5, 6, 9, 20)}


def trials_of(*values: float) -> PruningPlan:
    """A plan whose trials had these similarities, without a threshold."""
    trials = [
        Trial(first=n, last=n + 1, similarity=value, accepted=False)
        for n, value in enumerate(values)
    ]
    return sample_plans.depth_plan(trials=tuple(trials), operations=(), threshold=None)


@pytest.mark.parametrize("values", [(0.5,), (0.5, 0.5), (math.nan, 0.5), (math.inf, -3.0, -1.0)])
def test_odd_similarities_are_drawn(values: tuple[float, ...]) -> None:
    """One value, equal ones, negative ones and what is not finite break no scale."""
    svg = pictures.layer_scores(trials_of(*values))
    assert len(by_id(svg, r"scores-trial-\d+")) == len(values)
    assert "nan" not in svg
    assert pictures.layer_scores(trials_of(math.nan)) == ""


def test_bars_are_as_high_as_layers_are_wide() -> None:
    """A layer that keeps half the channels has half the bar of one that keeps all."""
    operations = (KeepChannels(layer=3, indices=tuple(range(768))),)
    plan = sample_plans.width_plan(5).model_copy(update={"operations": operations, "scores": ()})
    svg = pictures.widths(plan)
    bars = by_id(svg, r"widths-mlp_channel-\d+")
    assert list(bars) == [f"widths-mlp_channel-{layer}" for layer in range(5)]
    high = {layer: box(bar)[3] - box(bar)[1] for layer, bar in enumerate(bars.values())}
    assert high[3] == pytest.approx(high[4] / 2, rel=1e-3)
    assert {round(h, 3) for layer, h in high.items() if layer != 3} == {round(high[4], 3)}
    assert len(by_id(svg, r"widths-kv_group-\d+")) == 5
    assert not by_id(svg, r"widths-.*-score-\d+")
    assert pictures.widths(plan.model_copy(update={"operations": ()})) == ""


def test_every_shape_of_a_planner_has_a_dot() -> None:
    """One of its prediction, and one of its measurement where there is one."""
    svg = pictures.frontier(sample_plans.planned_shape())
    assert list(by_id(svg, r"frontier-predicted-\d+")) == [
        f"frontier-predicted-{i}" for i in (1, 2, 3)
    ]
    assert list(by_id(svg, r"frontier-measured-\d+")) == [
        "frontier-measured-2",
        "frontier-measured-3",
    ]
    assert pictures.frontier(sample_plans.hybrid_plan()) == ""


def test_shapes_of_as_many_layers_share_a_label() -> None:
    """Labels of dots that lie close together would cover one another."""
    plan = sample_plans.planned_shape()
    (first, *_) = plan.frontier
    twins = (first, first.model_copy(update={"kv_groups": 1, "chosen": False}))
    svg = pictures.frontier(plan.model_copy(update={"frontier": twins}))
    label = re.compile(r'translate\(([\d.]+) ([\d.]+)\)">[\d,]+ / \d')
    (x, upper), (same, lower) = (map(float, found) for found in label.findall(svg))
    assert x == pytest.approx(same) and abs(lower - upper) >= 8


def test_a_shape_of_different_widths_names_both_ends() -> None:
    """In two lines, because neighbours would cover a long one."""
    plan = sample_plans.planned_shape()
    (first, *_) = plan.frontier
    mixed = first.model_copy(update={"mlp_width": 1536, "widths": (1536, 0, 1200, 400)})
    svg = pictures.frontier(plan.model_copy(update={"frontier": (mixed,)}))
    assert ">400 to</text>" in svg and ">1,536</text>" in svg


def test_layers_that_a_plan_removes_have_no_bars() -> None:
    """Of a hybrid plan: those left stand where they were before it."""
    svg = pictures.widths(sample_plans.hybrid_plan())
    left = [layer for layer in range(30) if layer not in (5, 6, 9)]
    assert list(by_id(svg, r"widths-kv_group-\d+")) == [f"widths-kv_group-{i}" for i in left]


def test_dots_are_the_share_of_the_scores() -> None:
    """Three channels of scores 1, 2 and 5, of which the last remains, keep 62.5 %."""
    plan = sample_plans.width_plan(1)
    entry = plan.scores[0].model_copy(update={"scores": (1.0, 2.0, 5.0)})
    before = plan.before.model_copy(update={"intermediate_size": 3})
    changes = {"before": before, "operations": (KeepChannels(layer=0, indices=(2,)),)}
    svg = pictures.widths(plan.model_copy(update={**changes, "scores": (entry,)}))
    (bar,) = by_id(svg, r"widths-mlp_channel-\d+").values()
    (dot,) = by_id(svg, r"widths-mlp_channel-score-\d+").values()
    (use,) = dot.iter(f"{SVG}use")
    _, top, _, bottom = box(bar)
    assert (bottom - float(use.get("y", "nan"))) / (bottom - top) == pytest.approx(
        0.625 * 3, rel=0.01
    )
    for odd in ((0.0, 0.0, 0.0), (1.0, math.nan, 1.0), (-1.0, 2.0, 3.0)):
        scores = (entry.model_copy(update={"scores": odd}),)
        drawn = pictures.widths(plan.model_copy(update={**changes, "scores": scores}))
        assert not by_id(drawn, r"widths-mlp_channel-score-\d+")


def test_every_figure_of_both_states_has_a_chart(report: RunReport) -> None:
    """A chart each, with its name, its unit and its values; one-sided figures have none."""
    first, *rest = report.states
    alone = first.measurements[0].model_copy(update={"name": "only before"})
    state = first.model_copy(update={"measurements": (*first.measurements, alone)})
    svg = pictures.before_after(report.model_copy(update={"states": (state, *rest)}))
    assert len(by_id(svg, r"before-after-chart-\d+")) == 6
    said = words(svg)
    for measurement in first.measurements:
        assert any(text.startswith(measurement.name) for text in said)
    assert "only before" not in said
    for value in ("33.91", "52.91", "98.35", "61.72", "0.6850", "538.1 MB", "430.9 MB"):
        assert value in said
    assert "lower is better" in said and "higher is better" in said


def test_bars_are_as_long_as_their_values() -> None:
    """From zero: a bar of twice the value is twice as long."""
    report = samples.make_report()
    states = (report.states[0], report.states[-1])
    pairs = []
    for state, value in zip(states, (10.0, 20.0), strict=True):
        figure = state.measurements[0].model_copy(update={"value": value})
        pairs.append(state.model_copy(update={"measurements": (figure,)}))
    svg = pictures.before_after(report.model_copy(update={"states": tuple(pairs)}))
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
    svg = pictures.before_after(report.model_copy(update={"states": tuple(states)}))
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
    svg = pictures.before_after(report.model_copy(update={"states": (long[0], *middle, long[1])}))
    (name,) = (text for text in words(svg) if text.startswith("mmm"))
    assert len(name) == 36 and name.endswith("\N{HORIZONTAL ELLIPSIS}")


def test_nothing_in_common_is_no_picture() -> None:
    """One state, or other protocols after, leave nothing to compare."""
    report = samples.make_report()
    assert pictures.before_after(report.model_copy(update={"states": report.states[:1]})) == ""
