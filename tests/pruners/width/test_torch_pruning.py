"""Tests of slm_plugin.pruners.width.torch_pruning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

pytest.importorskip("torch_pruning")

from slm_plugin import extras
from slm_plugin.errors import CalibrationError, MissingExtraError, TargetError
from slm_plugin.models.fingerprint import fingerprint
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import KeepChannels, KeepHeads, PruningPlan
from slm_plugin.pruners.width.torch_pruning import TorchPruning, TorchPruningOptions
from slm_plugin.registry import pruners
from slm_plugin.session import Session
from slm_plugin.surgery import portability
from slm_plugin.target import Target
from tests.tiny import make_model, random_tokens


def _pruner(target: Target | None = None, **options: Any) -> TorchPruning:
    return TorchPruning(TorchPruningOptions(**options), target or Target(ratio=0.2))


def _session(model: PreTrainedModel | None = None) -> Session:
    model = model or make_model(num_hidden_layers=2)
    return Session(model, calibration=random_tokens())


def test_strategy_is_found_by_its_name() -> None:
    """A recipe finds the class under `torch_pruning`, as width pruning with its extra."""
    assert pruners.get("torch_pruning") is TorchPruning
    assert (TorchPruning.name, TorchPruning.kind) == ("torch_pruning", "width")
    assert (TorchPruning.targets, TorchPruning.extra) == (("ratio", "parameters"), "width")


def test_only_taylor_needs_calibration() -> None:
    """Magnitude works without text; Taylor says that it needs some."""
    assert _pruner(importance="taylor").needs_calibration
    assert not _pruner(importance="magnitude").needs_calibration
    session = Session(make_model(num_hidden_layers=2))
    assert _pruner(importance="magnitude").plan(session).operations
    with pytest.raises(CalibrationError):
        _pruner(importance="taylor").plan(session)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"importance": "magnitude", "norm": 1}, "not permitted"),
        ({"kv_groups": -1}, "greater than or equal to 0"),
        ({"kv_groups": True}, "valid integer"),
        ({"kv_groups": "all"}, "'auto'"),
        ({"multiple_of": 0}, "greater than or equal to 1"),
        ({"importance": "random"}, "'magnitude' or 'taylor'"),
        ({"importence": "taylor"}, "not permitted"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], complaint: str) -> None:
    """Every wrong option is named, and none is ignored."""
    with pytest.raises(ValidationError, match=complaint):
        TorchPruningOptions(**options)


@pytest.mark.parametrize("options", [{}, {"importance": "magnitude"}, {"kv_groups": 1}])
def test_options_written_out_read_back(options: dict[str, Any]) -> None:
    """What a plan or report records is valid input."""
    given = TorchPruningOptions(**options)
    assert TorchPruningOptions.model_validate(given.model_dump(mode="json")) == given


def test_every_option_is_described() -> None:
    """The schema, and so the docs, describe each key."""
    fields = TorchPruningOptions.model_json_schema()["properties"]
    assert all(field.get("description") for field in fields.values())


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_every_layer_loses_the_same_number(family: str, kv_heads: int, importance: str) -> None:
    """One operation a layer and kind keeps the best-scored units, and `after` adds up."""
    model = make_model(family, num_hidden_layers=2, num_key_value_heads=kv_heads)
    groups = {4: 2, 2: 1, 1: 0}[kv_heads]
    plan = _pruner(Target(ratio=0.3), importance=importance, kv_groups=groups).plan(_session(model))
    channels = [op for op in plan.operations if isinstance(op, KeepChannels)]
    heads = [op for op in plan.operations if isinstance(op, KeepHeads)]
    assert [op.layer for op in channels] == [0, 1]
    assert [op.layer for op in heads] == ([0, 1] if groups else [])
    assert {len(op.indices) for op in channels} == {plan.after.intermediate_size}
    assert {len(op.kv_groups) for op in heads} <= {plan.after.kv_heads} == {kv_heads - groups}
    assert plan.after.intermediate_size % 8 == 0
    scores = {(s.layer, s.unit): s.scores for s in plan.scores}
    assert len(scores) == 4
    for op in channels:
        _assert_best(scores[op.layer, "mlp_channel"], op.indices)
    for op in heads:
        _assert_best(scores[op.layer, "kv_group"], op.kv_groups)


def _assert_best(scores: tuple[float, ...], kept: tuple[int, ...]) -> None:
    gone = set(range(len(scores))) - set(kept)
    assert min(scores[i] for i in kept) >= max((scores[i] for i in gone), default=0.0)


@pytest.mark.parametrize("importance", ["magnitude", "taylor"])
def test_planning_leaves_the_model_as_it_is(importance: str) -> None:
    """Bits, gradients, flags and logits are as before; nothing stays captured."""
    model = make_model(num_hidden_layers=2)
    model.lm_head.weight.requires_grad_(False)
    before = fingerprint(model), [p.requires_grad for p in model.parameters()]
    with torch.no_grad():
        logits = model(random_tokens()).logits
    _pruner(importance=importance).plan(_session(model))
    assert (fingerprint(model), [p.requires_grad for p in model.parameters()]) == before
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        assert torch.equal(model(random_tokens()).logits, logits)


def test_plans_do_not_depend_on_what_was_planned_before() -> None:
    """Two models planned in either order give the same plans: no state leaks between them."""

    def plans(families: list[str]) -> dict[str, PruningPlan]:
        return {f: _pruner().plan(_session(make_model(f, num_hidden_layers=2))) for f in families}

    assert plans(["llama", "qwen3"]) == plans(["qwen3", "llama"])


def test_plan_survives_its_file(tmp_path: Path) -> None:
    """A written plan reads back equal, scores included."""
    plan = _pruner().plan(_session())
    plan.write(tmp_path / "plan.json")
    assert PruningPlan.read(tmp_path / "plan.json") == plan


def test_notes_say_what_the_target_became() -> None:
    """A reader sees counts, what was asked for and what the cut achieves."""
    session = _session(make_model(num_hidden_layers=2))
    plan = _pruner(Target(ratio=0.2), kv_groups=1).plan(session)
    assert plan.before.parameters == 23_712
    assert plan.notes == (
        "every layer keeps 40 of 48 MLP channels and 1 of 2 KV groups",
        "target 20.0% of the original parameters: 4,742 parameters requested, 4,608 removed, "
        "19,104 left; 19.43% of the original and 19.43% of the current parameters",
    )


def test_portability_warnings_are_part_of_the_plan() -> None:
    """A head count that no longer divides the hidden size evenly is warned of."""
    plan = _pruner(Target(ratio=0.2), kv_groups=1).plan(_session())
    assert any("head_dim stays 8" in warning for warning in plan.warnings)
    assert not _pruner(Target(ratio=0.2), kv_groups=0).plan(_session()).warnings


def test_impossible_target_is_refused_from_sizes_alone() -> None:
    """check_target needs no weights, and names the largest ratio."""
    dimensions = DecoderView.of(make_model()).dimensions()
    with pytest.raises(TargetError, match="out of reach") as refused:
        _pruner(Target(ratio=0.9)).check_target(dimensions, dimensions)
    assert "at most ratio" in refused.value.hint
    _pruner(Target(ratio=0.2)).check_target(dimensions, dimensions)


def test_heads_that_cannot_be_loaded_are_refused_before_any_work(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Under transformers 5 a Llama with 3 heads of a hidden size of 32 is refused at once."""
    monkeypatch.setattr(portability, "found_version", lambda _: "5.23.0")
    dimensions = DecoderView.of(make_model(num_key_value_heads=4)).dimensions()
    with pytest.raises(TargetError, match="3 heads") as refused:
        _pruner(kv_groups=1).check_target(dimensions, dimensions)
    assert "may be 0, 2, 3" in refused.value.hint


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch-pruning the error says what to install."""
    monkeypatch.setattr(extras, "found_version", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"slm-plugin\[width\]"):
        _pruner().plan(_session())


def test_ratio_counts_from_the_model_as_it_was_loaded() -> None:
    """After another stage took layers, a ratio is still a share of the original."""
    session = _session(make_model(num_hidden_layers=4))
    del session.model.model.layers[2:]
    session.model.config.num_hidden_layers = 2
    if getattr(session.model.config, "layer_types", None):
        session.model.config.layer_types = session.model.config.layer_types[:2]
    session.model_changed()
    plan = _pruner(Target(ratio=0.1)).plan(session)
    assert plan.before.layers == 2
    assert plan.parameters_removed == pytest.approx(0.1 * session.original.parameters, rel=0.2)
