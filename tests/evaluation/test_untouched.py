"""What every evaluator owes: the model, its mode and the captures as they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slm_plugin.registry import evaluators
from slm_plugin.session import Session

OPTIONS: dict[str, dict[str, Any]] = {
    "perplexity": {"source": "text.txt", "length": 8},
    "latency": {"prompt_tokens": 6, "new_tokens": 2, "repeats": 1},
    "footprint": {"tokens": 8},
    "lm_eval": {"tasks": ["builtin_continuation"], "limit": 2},
}


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_measuring_changes_nothing(
    name: str, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights are bit-equal, the mode is evaluation, captures and random states are the same."""
    if name == "lm_eval":
        pytest.importorskip("lm_eval", reason="needs lm-eval")
    (tmp_path / "text.txt").write_text("w7 w8 w9 w3 " * 10)
    monkeypatch.chdir(tmp_path)
    before, captured = session.fingerprint(), session.captured()
    inputs = [inputs.clone() for batch in captured for inputs in batch.inputs]
    state = torch.get_rng_state()
    cls = evaluators.get(name)
    evaluator = cls(cls.Options.model_validate(OPTIONS[name]))
    evaluator.check()
    assert session.measure(evaluator)
    again = Session(session.model)
    assert again.fingerprint() == before
    assert not any(module.training for module in session.model.modules())
    assert not session.model._forward_hooks and not session.model._forward_pre_hooks
    assert session.captured() is captured
    kept = [inputs for batch in captured for inputs in batch.inputs]
    assert all(torch.equal(a, b) for a, b in zip(kept, inputs, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_measurements_compare_between_runs(
    name: str, session: Session, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two evaluators with the same options give the same names and protocols."""
    if name == "lm_eval":
        pytest.importorskip("lm_eval", reason="needs lm-eval")
    (tmp_path / "text.txt").write_text("w7 w8 w9 w3 " * 10)
    monkeypatch.chdir(tmp_path)
    cls = evaluators.get(name)
    runs = [cls(cls.Options.model_validate(OPTIONS[name])).measure(session) for _ in range(2)]
    first, second = ([(m.name, m.protocol, m.better) for m in run] for run in runs)
    assert first == second
    assert len({name for name, _, _ in first}) == len(first)
