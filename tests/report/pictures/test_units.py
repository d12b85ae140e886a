"""What every layer keeps: bars, cells and scores."""

from __future__ import annotations

import math
import statistics

import pytest

from slm_plugin.plans import KeepChannels, KeepHeads
from slm_plugin.report.pictures import canvas, widths
from slm_plugin.report.pictures.units import Spread, spread
from tests.report import sample_plans
from tests.report.pictures.drawing import box, by_id, style, words

pytest.importorskip("matplotlib")


def test_bars_are_as_high_as_layers_are_wide() -> None:
    """A layer that keeps half the channels has half the bar of one that keeps all."""
    operations = (KeepChannels(layer=3, indices=tuple(range(768))),)
    plan = sample_plans.width_plan(5).model_copy(update={"operations": operations, "scores": ()})
    bars = by_id(widths(plan), r"widths-channels-\d+")
    assert list(bars) == [f"widths-channels-{layer}" for layer in range(5)]
    high = {layer: box(bar)[3] - box(bar)[1] for layer, bar in enumerate(bars.values())}
    assert high[3] == pytest.approx(high[4] / 2, rel=1e-3)
    assert {round(h, 3) for layer, h in high.items() if layer != 3} == {round(high[4], 3)}


def test_cells_show_which_groups_stay() -> None:
    """One cell a layer and group: filled when the plan keeps it, hatched when not."""
    plan = sample_plans.width_plan(5)
    cells = by_id(widths(plan), r"widths-group-\d+-\d+")
    assert len(cells) == 5 * 3
    kept = {
        (op.layer, group)
        for op in plan.operations
        if isinstance(op, KeepHeads)
        for group in op.kv_groups
    }
    for name, cell in cells.items():
        layer, group = map(int, name.split("-")[-2:])
        look = style(cell).lower()
        assert (canvas.BLUE.lower() in look) is ((layer, group) in kept)
        assert ("url(#" in look) is ((layer, group) not in kept)


def test_panels_follow_what_the_plan_holds() -> None:
    """Channels only, groups only, without scores, and nothing at all."""
    plan = sample_plans.width_plan(5)
    channels = tuple(op for op in plan.operations if isinstance(op, KeepChannels))
    groups = tuple(op for op in plan.operations if isinstance(op, KeepHeads))

    def titles(**changes: object) -> list[str]:
        svg = widths(plan.model_copy(update=changes))
        return [w for w in words(svg) if w.startswith(("MLP", "KV groups", "Scores"))]

    assert [title.split(":")[0] for title in titles()] == [
        "MLP channels per layer",
        "Scores of MLP channels",
        "KV groups (key/value heads with their query heads)",
        "Scores of KV groups",
    ]
    assert len(titles(operations=channels)) == 2
    assert len(titles(operations=groups, scores=())) == 1
    assert widths(plan.model_copy(update={"operations": ()})) == ""


def test_the_key_is_always_there() -> None:
    """Kept and removed are explained, whatever the first panel is."""
    plan = sample_plans.width_plan(5)
    groups = tuple(op for op in plan.operations if isinstance(op, KeepHeads))
    for operations in (plan.operations, groups):
        said = words(widths(plan.model_copy(update={"operations": operations})))
        assert said.count("kept") == said.count("removed") == 1


def test_spread_is_lowest_median_and_highest() -> None:
    """Of the finite scores; of none there is no spread."""
    scores = [5.0, 1.0, math.nan, 2.0, math.inf, 9.0]
    assert spread(scores) == Spread(1.0, statistics.median([1, 2, 5, 9]), 9.0)
    assert spread([]) is None and spread([math.nan]) is None


def test_many_groups_are_counted_instead_of_drawn_one_by_one() -> None:
    """A model of 64 KV heads gets a bar a layer."""
    plan = sample_plans.width_plan(5)
    before = plan.before.model_copy(update={"kv_heads": 64})
    operations = (KeepHeads(layer=0, kv_groups=tuple(range(32))),)
    svg = widths(plan.model_copy(update={"before": before, "operations": operations}))
    bars = by_id(svg, r"widths-groups-\d+")
    high = [box(bar)[3] - box(bar)[1] for bar in bars.values()]
    assert len(bars) == 5
    assert high[0] == pytest.approx(high[1] / 2, rel=1e-3)
