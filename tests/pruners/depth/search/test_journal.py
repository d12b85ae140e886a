"""Journals of trials; damage to their files is tested in ``tests/test_cache.py``."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from slm_plugin.cache import Store
from slm_plugin.pruners.depth.search.journal import Journal, is_part
from slm_plugin.pruners.depth.search.runs import Run, Runs

RUNS: list[Runs] = [(Run(n, n + 1, "mean"),) for n in range(4)]


def opened(path: Path) -> Journal:
    """The journal in a file."""
    return Journal(Store(path, "about", is_part))


def written(path: Path) -> list[str]:
    """The lines of a journal of four trials."""
    journal = opened(path)
    for number, runs in enumerate(RUNS):
        journal.add(runs, [number / 7, 1e-300])
    return path.read_text().splitlines(keepends=True)


def test_values_come_back_to_the_last_digit(tmp_path: Path) -> None:
    """All parts of a trial, in their order, wherever their lines are."""
    path = tmp_path / "j.jsonl"
    written(path)
    opened(path).add(RUNS[0], [1 / 3])
    path.write_text("".join(reversed(path.read_text().splitlines(keepends=True))))
    again = opened(path)
    assert again.cached(RUNS[0]) == [[0.0, 1e-300], [1 / 3]]
    assert again.cached(RUNS[3]) == [[3 / 7, 1e-300]]
    assert again.read_from_disk == 4


def test_later_parts_need_the_earlier(tmp_path: Path) -> None:
    """A part whose predecessor is lost is measured again with it."""
    path = tmp_path / "j.jsonl"
    written(path)
    opened(path).add(RUNS[0], [1 / 3])
    path.write_text("".join(path.read_text().splitlines(keepends=True)[1:]))
    again = opened(path)
    assert again.cached(RUNS[0]) == [] and again.read_from_disk == 3


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ([[[0, 1, "mean"]], 0], [math.nan]),
        ([[[0, 1, "mean"]], 0], [math.inf]),
        ([[[0, 1, "mean"]], 0], "text"),
        ([[[0, 1, "mean"]], "0"], [0.5]),
        ([[[0, 1, "mean", "more", "still"]], 0], [0.5]),
        ([[[0, 1, []]], 0], [0.5]),
        ([3, 0], [0.5]),
        ("key", [0.5]),
    ],
)
def test_a_line_holds_runs_and_finite_values(tmp_path: Path, key: Any, values: Any) -> None:
    """Anything else is damage, even with a right checksum."""
    path = tmp_path / "j.jsonl"
    Store(path, "about").store(key, values)
    assert json.loads(path.read_text())["key"] == key
    assert opened(path).read_from_disk == 0
    assert (tmp_path / "j.jsonl.damaged-1").exists()
