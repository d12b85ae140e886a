"""What every registered component owes the model: nothing but its work is done to it.

Components are called by themselves here, so that a session which puts something back hides
nothing. A new component joins through its registry; one whose options have no defaults needs a
line in OPTIONS.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from slm_plugin.errors import MissingExtraError
from slm_plugin.extras import require
from slm_plugin.plans import MergeLayers
from slm_plugin.recovery.base import Recovery
from slm_plugin.registry import Registry, evaluators, exporters, pruners, recoveries
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.recovery.pruned import remove
from tests.tiny import make_model, make_tokenizer, random_tokens

OPTIONS: dict[tuple[str, str], dict[str, Any]] = {
    ("evaluator", "perplexity"): {"source": "text.txt", "length": 8},
    ("evaluator", "latency"): {"prompt_tokens": 6, "new_tokens": 2, "repeats": 1},
    ("evaluator", "footprint"): {"tokens": 8},
    ("evaluator", "lm_eval"): {"tasks": ["builtin_continuation"], "limit": 2},
    ("pruner", "hybrid"): {"screen": 2, "verify": 2},
    ("pruner", "repaired"): {"screen": 2},
    ("pruner", "shapley"): {"samples": 20},
    ("recovery", "lora"): {"epochs": 1},
    ("recovery", "streamline"): {"epochs": 1},
}
TARGETS: dict[str, dict[str, Any]] = {
    "layers_removed": {"layers_removed": 2},
    "ratio": {"ratio": 0.2},
    "threshold": {"threshold": 0.9},
    "parameters": {"parameters": 40_000},
    "latency": {"latency": {"decode": 0.8}},
    "memory": {"memory": "150kB"},
}


# Strategies that suit a family alone.
MODELS = {"experts": "qwen3_moe"}


def component(registry: Registry[Any], name: str) -> Any:
    """A component with its extra installed; a strategy with the first target that it takes."""
    kind = registry.get(name)
    if kind.extra is not None:
        try:
            require(kind.extra, name)
        except MissingExtraError as error:
            pytest.skip(str(error))
    options = kind.Options.model_validate(OPTIONS.get((registry.kind, name), {}))
    if registry is not pruners:
        return kind(options)
    return kind(options, Target(**TARGETS[kind.targets[0]]))


def session_of(model: PreTrainedModel | None = None) -> Session:
    """A session with all that a component may ask for."""
    made = make_model(num_hidden_layers=8) if model is None else model
    return Session(made, make_tokenizer(), random_tokens(6, 12))


def facts(model: PreTrainedModel) -> dict[str, Any]:
    """Everything of a model but the values of its weights, written out."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    modules = dict(model.named_modules())
    return {
        "config": model.config.to_dict(),
        "generation": model.generation_config.to_dict() if model.generation_config else None,
        "modules": {name: type(module) for name, module in modules.items()},
        "modes": [name for name, module in modules.items() if module.training],
        "hooks": {n: [list(getattr(m, hook)) for hook in hooks] for n, m in modules.items()},
        "parameters": {
            name: (tuple(p.shape), p.dtype, p.device, p.requires_grad, p.grad)
            for name, p in model.named_parameters()
        },
        "buffers": {name: buffer.tolist() for name, buffer in model.named_buffers()},
        "indices": [layer.self_attn.layer_idx for layer in model.model.layers],
    }


def process() -> list[Any]:
    """Settings and random generators of the process."""
    return [
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # type: ignore[index,union-attr]
    ]


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Copies of all weights."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def assert_same_weights(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> None:
    """No bit is another one."""
    after = dict(model.named_parameters())
    assert after.keys() == before.keys()
    for name, former in before.items():
        assert torch.equal(after[name], former), name


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a text to read."""
    (tmp_path / "text.txt").write_text("w7 w8 w9 w3 " * 10)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", pruners.names())
def test_planning_changes_nothing_and_draws_from_the_seed_alone(name: str) -> None:
    """Two plans are equal whatever the process drew before, and neither left a trace."""
    pruner = component(pruners, name)
    session = session_of(make_model(MODELS.get(name, "llama"), num_hidden_layers=8))
    before, copies = facts(session.model), weights(session.model)
    made = []
    for seed in (1, 2):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        state = process()
        made.append(pruner.plan(session).to_json())
        assert process() == state
        session.release()
    assert made[0] == made[1]
    assert facts(session.model) == before
    assert_same_weights(session.model, copies)


@pytest.mark.parametrize("name", pruners.names())
def test_training_mode_makes_no_other_plan(name: str) -> None:
    """A model that is handed over in training mode, with dropout, is planned for as any other."""
    family = MODELS.get(name, "llama")
    dropping = make_model(family, num_hidden_layers=8, attention_dropout=0.5)
    session = session_of(dropping.train())
    expected = session_of(make_model(family, num_hidden_layers=8, attention_dropout=0.5))
    found = session.plan(component(pruners, name))
    assert found == expected.plan(component(pruners, name))
    dropping.train()
    assert session.plan(component(pruners, name)) == found


@pytest.mark.parametrize("name", recoveries.names())
def test_a_recovery_changes_weights_alone_and_the_session_knows(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing is left behind, nothing had to be put back, and a former plan is refused."""
    session, recovery = session_of(), component(recoveries, name)
    assert isinstance(recovery, Recovery)
    session.keep_reference()
    remove(session, MergeLayers(first=2, last=4))
    before, former, captured = facts(session.model), session.fingerprint(), session.captured()
    state = process()
    session.recover(recovery)
    after = facts(session.model)
    if recovery.operators:
        for part in ("modules", "hooks", "parameters"):
            after[part] = {n: f for n, f in after[part].items() if "stream_operator" not in n}
        after["hooks"] = before["hooks"]
    assert after == before
    assert process() == state
    assert session.fingerprint() != former
    assert session.captured() is not captured
    assert "put back" not in capsys.readouterr().err


@pytest.mark.parametrize("name", evaluators.names())
def test_measuring_changes_nothing(name: str, here: Path) -> None:
    """Weights, settings, captures and random generators are as before."""
    session, evaluator = session_of(), component(evaluators, name)
    before, copies, captured = facts(session.model), weights(session.model), session.captured()
    state, special = process(), dict(session.tokenizer.special_tokens_map)  # type: ignore[union-attr]
    evaluator.check()
    evaluator.check_model(session)
    assert evaluator.measure(session)
    assert facts(session.model) == before
    assert process() == state
    assert_same_weights(session.model, copies)
    assert session.captured() is captured
    assert session.tokenizer.special_tokens_map == special  # type: ignore[union-attr]


@pytest.mark.parametrize("name", exporters.names())
def test_exporting_changes_nothing(name: str, tmp_path: Path, reload_here: None) -> None:
    """The config and the generation config in memory, too, are as before."""
    model = make_model(num_hidden_layers=2)
    model.generation_config.temperature = 0.3  # type: ignore[union-attr]
    session, exporter = session_of(model), component(exporters, name)
    before, copies = facts(session.model), weights(session.model)
    state = process()
    record = exporter.export(session, tmp_path)
    assert (tmp_path / record.folder).is_dir()
    assert facts(session.model) == before
    assert process() == state
    assert_same_weights(session.model, copies)
