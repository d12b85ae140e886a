"""An isolated package has no side effects."""

from __future__ import annotations

import io
import logging
import os
import random

import numpy as np
import pytest
import torch
from tqdm import tqdm

from slm_plugin.evaluation.isolation import isolated


def draw() -> tuple[float, float, float]:
    """The next number of every random generator."""
    return random.random(), float(np.random.random()), torch.rand(1).item()


def test_random_states_are_restored() -> None:
    """Seeding inside changes nothing outside."""
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    expected = draw()
    random.seed(1)
    np.random.seed(1)
    torch.manual_seed(1)
    with isolated("some.package", logging.WARNING):
        random.seed(5)
        np.random.seed(5)
        torch.manual_seed(5)
        draw()
    assert draw() == expected


def test_environment_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables set, changed and removed inside are as before outside, also after an error."""
    monkeypatch.setenv("GUEST_CHANGED", "old")
    monkeypatch.setenv("GUEST_REMOVED", "kept")
    before = dict(os.environ)
    with pytest.raises(RuntimeError), isolated("some.package", logging.WARNING):
        os.environ["GUEST_CHANGED"] = os.environ["GUEST_NEW"] = "new"
        del os.environ["GUEST_REMOVED"]
        raise RuntimeError
    assert dict(os.environ) == before


def test_prints_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Standard output stays clean, and what was printed is not lost."""
    with isolated("some.package", logging.WARNING):
        print("chatter")  # noqa: T201
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "chatter\n")


def test_log_is_held_to_the_level() -> None:
    """The logger has the level inside and its own outside."""
    log = logging.getLogger("some.package")
    log.setLevel(logging.DEBUG)
    with isolated("some.package", logging.ERROR):
        assert not log.isEnabledFor(logging.WARNING)
    assert log.level == logging.DEBUG


def test_bars_show_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Off a terminal a bar draws nothing, even one that is not to be disabled."""
    for terminal in (False, True):
        monkeypatch.setattr("slm_plugin.evaluation.isolation.console", Console(terminal))
        with isolated("some.package", logging.WARNING):
            stream = io.StringIO()
            assert list(tqdm(range(3), file=stream, disable=False)) == [0, 1, 2]
        assert bool(stream.getvalue()) is terminal
    stream = io.StringIO()
    list(tqdm(range(3), file=stream))
    assert stream.getvalue()


class Console:
    """Stands in for the progress console."""

    def __init__(self, is_terminal: bool) -> None:
        self.is_terminal = is_terminal
