"""The measured cost of a function."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from slm_plugin.comparison.cost import measure_cost
from slm_plugin.evaluation import footprint
from slm_plugin.session import Session
from tests.tiny import make_model

needs_proc = pytest.mark.skipif(
    not footprint.RESET.exists(), reason="the peak is read from Linux's /proc"
)


@needs_proc
def test_memory_is_that_of_the_work_alone() -> None:
    """64 MB of its own count; 200 MB that were allocated before do not."""
    session = Session(make_model())
    held = torch.ones(200 * 2**20, dtype=torch.uint8)
    _, cost = measure_cost(session, lambda: torch.ones(64 * 2**20, dtype=torch.uint8).numel())
    assert cost.memory is not None
    assert 60 * 2**20 < cost.memory < 80 * 2**20
    assert held.all()


def test_work_is_done_once_where_no_peak_can_be_had(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Result and time are returned nonetheless."""
    monkeypatch.setattr(footprint, "RESET", tmp_path / "no" / "clear_refs")
    calls = []
    result, cost = measure_cost(
        Session(make_model()), lambda: (calls.append(1), time.sleep(0.05), "done")[-1]
    )
    assert (result, calls, cost.memory) == ("done", [1], None)
    assert 0.05 <= cost.seconds < 1


def test_trials_that_were_known_are_counted() -> None:
    """Only those of this piece of work."""
    session = Session(make_model())
    session.known_trials = 5

    def search() -> None:
        session.known_trials += 3

    assert measure_cost(session, search)[1].known_trials == 3
