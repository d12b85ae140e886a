"""The plot of the layer mapping: lines that end at the right box."""

from __future__ import annotations

import pytest

from slm_plugin.plans import DropLayers
from slm_plugin.report import pictures
from slm_plugin.report.plan_effects import layer_mapping
from tests.report import sample_plans
from tests.report.pictures.drawing import SVG, by_id, parse, points, words

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
