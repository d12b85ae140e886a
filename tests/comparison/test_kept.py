"""Pieces of comparisons on disk."""

from __future__ import annotations

import math
from pathlib import Path

from slm_plugin.comparison.kept import Kept
from slm_plugin.comparison.record import Cell
from slm_plugin.evaluation.base import Measurement

FIGURE = Measurement(name="perplexity", value=math.inf, protocol="p", better="lower")
CELL = Cell(label="dense", measured={"perplexity": (FIGURE,), "a": (FIGURE,)})


def test_a_piece_is_found_by_all_its_facts(tmp_path: Path) -> None:
    """The same facts in any order find it whole; one that differs does not."""
    kept = Kept(tmp_path, {"seed": 1, "model": "m"})
    kept.keep(CELL, {"target": 3})
    found = Kept(tmp_path, {"model": "m", "seed": 1}).find(Cell, {"target": 3})
    assert found == CELL
    assert found is not None and list(found.measured) == ["perplexity", "a"]
    assert kept.find(Cell, {"target": 4}) is None
    assert Kept(tmp_path, {"seed": 2, "model": "m"}).find(Cell, {"target": 3}) is None


def test_fresh_reads_nothing_and_writes(tmp_path: Path) -> None:
    """What lies there is left unread and replaced."""
    Kept(tmp_path, {}).keep(CELL, {})
    fresh = Kept(tmp_path, {}, fresh=True)
    assert fresh.find(Cell, {}) is None
    fresh.keep(CELL.model_copy(update={"label": "newer"}), {})
    found = Kept(tmp_path, {}).find(Cell, {})
    assert found is not None and found.label == "newer"


def test_a_damaged_file_counts_as_none(tmp_path: Path) -> None:
    """Half a file, or one of another version, is made anew."""
    kept = Kept(tmp_path, {})
    kept.keep(CELL, {})
    (file,) = tmp_path.iterdir()
    for text in (file.read_text()[:-9], '{"label": "x", "unknown": 1}'):
        file.write_text(text)
        assert kept.find(Cell, {}) is None
