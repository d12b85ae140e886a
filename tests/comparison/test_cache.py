"""The cache of a comparison's plans and cells."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from slm_plugin.comparison.cache import CellCache, is_cell, is_plan
from slm_plugin.comparison.record import Cell, Cost, Planned
from slm_plugin.evaluation.base import Measurement
from slm_plugin.pruners.depth.deepest import Deepest
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.tiny import make_model

FIGURE = Measurement(name="perplexity", value=math.inf, protocol="p", better="lower")
CELL = Cell(label="dense", measured={"perplexity": (FIGURE,), "a": (FIGURE,)})


def test_an_entry_is_found_by_all_its_facts(tmp_path: Path) -> None:
    """The same facts in any order find it whole; one that differs does not."""
    cache = CellCache.of(tmp_path, {"seed": 1, "model": "m"})
    cache.add(CELL, {"target": 3})
    found = CellCache.of(tmp_path, {"model": "m", "seed": 1}).find(Cell, {"target": 3})
    assert found == CELL
    assert found is not None and list(found.measured) == ["perplexity", "a"]
    assert cache.find(Cell, {"target": 4}) is None
    assert CellCache.of(tmp_path, {"seed": 2, "model": "m"}).find(Cell, {"target": 3}) is None


def test_fresh_reads_nothing_and_writes(tmp_path: Path) -> None:
    """Cached entries are ignored and replaced."""
    CellCache.of(tmp_path, {}).add(CELL, {})
    fresh = CellCache.of(tmp_path, {}, fresh=True)
    assert fresh.find(Cell, {}) is None
    fresh.add(CELL.model_copy(update={"label": "newer"}), {})
    found = CellCache.of(tmp_path, {}).find(Cell, {})
    assert found is not None and found.label == "newer"


@pytest.mark.parametrize("value", [math.nan, -math.nan])
def test_a_figure_is_a_number(tmp_path: Path, value: float) -> None:
    """Infinity is a figure, NaN is none; neither is a time."""
    cache = CellCache.of(tmp_path, {})
    figure = FIGURE.model_copy(update={"value": value})
    cache.add(CELL.model_copy(update={"measured": {"a": (figure,)}}), {})
    assert cache.find(Cell, {}, lambda cell: is_cell(cell, CELL)) is None
    with pytest.raises(ValueError, match="finite"):
        Cost(seconds=value)


def test_a_plan_belongs_to_its_method_target_and_model(tmp_path: Path) -> None:
    """One of another strategy, with other options, target or model is computed again."""
    session = Session(make_model())
    other = Session(make_model(seed=1))
    plan = Deepest(Deepest.Options(), Target(layers_removed=2)).plan(session)
    planned = Planned(plan=plan, cost=Cost(seconds=1))
    facts = {
        "method": "deepest",
        "options": plan.model_dump(mode="json")["options"],
        "target": plan.target.model_dump(mode="json"),
    }
    assert is_plan(planned, facts, session)
    assert not is_plan(planned, facts, other)
    target = Target(layers_removed=1).model_dump(mode="json")
    for changed in ({"method": "slm"}, {"options": {"x": 1}}, {"target": target}):
        assert not is_plan(planned, {**facts, **changed}, session)
    broken = plan.model_copy(update={"operations": ()})
    cache = CellCache.of(tmp_path, {})
    cache.add(Planned(plan=broken, cost=Cost(seconds=1)), facts)
    assert cache.find(Planned, facts, lambda one: is_plan(one, facts, session)) is None
