"""The cache of a comparison's plans and cells."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from slm_plugin.comparison.cache import CellCache, is_cell, is_plan
from slm_plugin.comparison.record import Cell, Cost, Planned
from slm_plugin.evaluation.base import Measurement
from slm_plugin.pruners.depth.deepest import Deepest
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.conftest import make_model

FIGURE = Measurement(name="perplexity", value=math.inf, protocol="p", better="lower")
CELL = Cell(label="dense", measured={"perplexity": (FIGURE,), "a": (FIGURE,)})


def test_an_entry_is_found_by_all_its_facts(tmp_path: Path) -> None:
    """The same facts in any order find it whole; one that differs does not."""
    cache = CellCache(tmp_path, {"seed": 1, "model": "m"})
    cache.store(CELL, {"target": 3})
    found = CellCache(tmp_path, {"model": "m", "seed": 1}).find(Cell, {"target": 3})
    assert found == CELL
    assert found is not None and list(found.measured) == ["perplexity", "a"]
    assert cache.find(Cell, {"target": 4}) is None
    assert CellCache(tmp_path, {"seed": 2, "model": "m"}).find(Cell, {"target": 3}) is None


def test_fresh_reads_nothing_and_writes(tmp_path: Path) -> None:
    """Cached entries are ignored and replaced."""
    CellCache(tmp_path, {}).store(CELL, {})
    fresh = CellCache(tmp_path, {}, fresh=True)
    assert fresh.find(Cell, {}) is None
    fresh.store(CELL.model_copy(update={"label": "newer"}), {})
    found = CellCache(tmp_path, {}).find(Cell, {})
    assert found is not None and found.label == "newer"


def damaged(text: str) -> list[str]:
    """A file of the cache, spoilt in many ways."""
    return [
        text[:-9],
        "",
        "[]",
        "null",
        "[" * 100_000,
        '{"label": "x", "unknown": 1}',
        json.dumps(json.loads(text)["content"]),
        text.replace("perplexity", "perplexity 128"),
        text.replace("Infinity", "3.5"),
        text.replace('"sum": "', '"sum": "0'),
        "9" * 5000,
        text + "\x00",
    ]


def test_a_damaged_file_is_reported_and_set_aside(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half a file, an edited one, or one without checksum, is renamed and computed again."""
    cache = CellCache(tmp_path, {})
    cache.store(CELL, {})
    (file,) = tmp_path.iterdir()
    for number, text in enumerate(damaged(file.read_text()), start=1):
        cache.store(CELL, {})
        file.write_text(text)
        assert cache.find(Cell, {}) is None
        message = capsys.readouterr().err.replace("\n", " ")
        assert "is damaged" in message and f"{file.name}.damaged-{number}" in message
        assert file.with_name(f"{file.name}.damaged-{number}").read_text() == text
        assert not file.exists()


def test_a_file_that_was_moved_is_not_taken(tmp_path: Path) -> None:
    """A cell under another cell's file name is rejected."""
    cache = CellCache(tmp_path, {})
    cache.store(CELL, {"target": 1})
    (first,) = tmp_path.iterdir()
    cache.store(CELL.model_copy(update={"label": "other"}), {"target": 2})
    (second,) = set(tmp_path.iterdir()) - {first}
    first.replace(second)
    assert cache.find(Cell, {"target": 2}) is None


def test_a_plan_of_an_earlier_version_is_read() -> None:
    """Its cost is called effort there."""
    plan = Deepest(Deepest.Options(), Target(layers_removed=2)).plan(Session(make_model()))
    planned = Planned(plan=plan, cost=Cost(seconds=1, known_trials=2))
    earlier = planned.model_dump(mode="json")
    earlier["effort"] = earlier.pop("cost")
    assert Planned.model_validate(earlier) == planned


@pytest.mark.parametrize("value", [math.nan, -math.nan])
def test_a_figure_is_a_number(tmp_path: Path, value: float) -> None:
    """Infinity is a figure, NaN is none; neither is a time."""
    cache = CellCache(tmp_path, {})
    figure = FIGURE.model_copy(update={"value": value})
    cache.store(CELL.model_copy(update={"measured": {"a": (figure,)}}), {})
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
    cache = CellCache(tmp_path, {})
    cache.store(Planned(plan=broken, cost=Cost(seconds=1)), facts)
    assert cache.find(Planned, facts, lambda one: is_plan(one, facts, session)) is None
