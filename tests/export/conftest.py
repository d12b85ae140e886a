"""A reload that stays in this process, where a new one would prove no more."""

from __future__ import annotations

import io
import subprocess
from collections.abc import Iterator
from contextlib import redirect_stdout
from typing import Any

import pytest
import torch

from slm_plugin.export import checkpoint, parity, reload


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models spend more time on handing work to threads than on the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def reload_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the reload program in this process and on fewer tokens: the same program, sooner."""
    monkeypatch.setattr(parity, "NEW_TOKENS", 4)

    def run(module: str, *arguments: str, **_: Any) -> subprocess.CompletedProcess[str]:
        assert module == "slm_plugin.export.reload"
        printed = io.StringIO()
        with redirect_stdout(printed):
            reload.main([*arguments])
        return subprocess.CompletedProcess([module], 0, printed.getvalue(), "")

    monkeypatch.setattr(checkpoint, "run_module", run)
