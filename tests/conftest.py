"""Fixtures of all tests. What imports PyTorch is imported where it is used."""

from __future__ import annotations

import gc
import io
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from slm_plugin import extras, interruption

if TYPE_CHECKING:
    from tests.tiny import ModelFactory

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_collection_finish() -> None:
    """What the libraries have made stays, so no collection needs to look at it again.

    Nor as often as by default: a tiny model is thousands of objects.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@pytest.fixture(autouse=True, scope="module")
def frozen_heap() -> None:
    """Nor what earlier modules left: whoever measures memory collects before each step."""
    gc.collect()
    gc.freeze()


_caches = itertools.count()


@pytest.fixture(autouse=True)
def own_journals(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No test reads trials that an earlier one, or an earlier version, left in the cache."""
    # Made by who uses it: a folder per test would be thousands.
    cache = tmp_path_factory.getbasetemp() / f"cache-{next(_caches)}"
    if "real" in request.keywords:
        monkeypatch.setattr("slm_plugin.preparation.cache_folder", lambda: cache)
    else:
        monkeypatch.setenv("SLM_PLUGIN_CACHE", str(cache))


@pytest.fixture(autouse=True)
def own_signals() -> Iterator[None]:
    """The command line, when a test calls it here, handles signals in its own test only."""
    before = {number: signal.getsignal(number) for number in interruption.SIGNALS}
    hook = sys.unraisablehook
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    sys.unraisablehook = hook


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Calibration ids in a JSON file."""
    from tests.tiny import random_tokens

    path = tmp_path / "ids.json"
    path.write_text(json.dumps(random_tokens(6, 24).tolist()))
    return path


@pytest.fixture
def family() -> str:
    """The family for tests in which none differs from another; one whose projections have biases.

    `tests/models/families/test_matrix.py` runs all families.
    """
    return "qwen2"


@pytest.fixture
def tiny() -> ModelFactory:
    """`make_model`, for tests that need models of their own shape."""
    from tests.tiny import make_model

    return make_model


@pytest.fixture
def no_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without the extra `report`: pictures take longer than a run to draw."""
    missing = extras.missing
    monkeypatch.setattr(
        extras, "missing", lambda extra: ("matplotlib",) if extra == "report" else missing(extra)
    )


@pytest.fixture
def reload_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the reload program in this process and on fewer tokens: the same program, sooner.

    ``test_a_fresh_process_proves_the_whole_folder`` and the command line's run have a new process.
    """
    from slm_plugin.export import checkpoint, parity, reload

    monkeypatch.setattr(parity, "NEW_TOKENS", 4)

    def run(module: str, *arguments: str, **_: Any) -> subprocess.CompletedProcess[str]:
        assert module == "slm_plugin.export.reload"
        printed = io.StringIO()
        with redirect_stdout(printed):
            reload.main([*arguments])
        return subprocess.CompletedProcess([module], 0, printed.getvalue(), "")

    monkeypatch.setattr(checkpoint, "run_module", run)


@pytest.fixture
def no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep lm-eval's own 14,000 tasks out of the index, which takes it half a minute to read."""
    from lm_eval import tasks

    class Small(tasks.TaskManager):
        def __init__(self, include_path: str | None = None, include_defaults: bool = True) -> None:
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(tasks, "TaskManager", Small)
