"""Rotation of the residual stream, and the removal of its last principal components."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

pytest.importorskip("torch_pruning")

from slm_plugin import prune
from slm_plugin.calibration.components import principal_components
from slm_plugin.errors import PlanError
from slm_plugin.models.loading import ModelSource
from slm_plugin.models.view import DecoderView
from slm_plugin.pipeline import apply_plan
from slm_plugin.plans import KeepHidden, PruningPlan, RotateHidden
from slm_plugin.pruners.width.width import Width
from slm_plugin.pruners.width.width_options import WidthOptions
from slm_plugin.session import Session
from slm_plugin.surgery import apply_operations
from slm_plugin.surgery.stream import rotate_stream
from slm_plugin.target import Target
from tests.recovery.pruned import seen_by
from tests.surgery.test_hidden import REMOVABLE, in_float64, logits, small
from tests.tiny import SMOLLM2, make_model, make_tokenizer, random_tokens

TOKENS = random_tokens(10, 12)


def orthogonal(size: int = 32) -> Tensor:
    """A random orthogonal matrix in float64."""
    generator = torch.Generator().manual_seed(4)
    found: Tensor = torch.linalg.qr(
        torch.randn(size, size, generator=generator, dtype=torch.float64)
    ).Q
    return found


def strategy(ratio: float = 0.4, **options: Any) -> Width:
    """The strategy by the shared rotation, with another score for MLP channels."""
    settings = {"hidden_channels": 8, "hidden_score": "pca", "multiple_of": 4, "restore": "none"}
    made = WidthOptions.model_validate({"score": "wanda_sp", **settings, **options})
    return Width(made, Target(ratio=ratio))


def rotated(model: PreTrainedModel, kept: int) -> Session:
    """A session whose stream was rotated, and keeps its first components."""
    session = Session(model, calibration=TOKENS, batch_tokens=48)
    session.keep_reference()
    before = session.view.dimensions()
    after = before.untied().without_hidden(before.hidden_size - kept)
    operations = (
        RotateHidden(calibration=str(session.digest)),
        KeepHidden(indices=tuple(range(kept))),
    )
    plan = PruningPlan(
        pruner="test",
        kind="width",
        target=Target(ratio=0.1),
        fingerprint=session.fingerprint(),
        before=before,
        after=after,
        operations=operations,
    )
    assert PruningPlan.parse(plan.to_json()) == plan
    session.apply(plan)
    return session


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", REMOVABLE)
def test_a_rotation_alone_changes_nothing(family: str, tied: bool) -> None:
    """In float64 to the last digits, whatever orthogonal matrix it is; the head is untied."""
    model = in_float64(small(family, tie_word_embeddings=tied))
    view = DecoderView.of(model)
    before, expected = view.dimensions(), logits(model)
    former = view.embedding.weight.detach().clone()
    rotate_stream(view, orthogonal())
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(view.embedding.weight, former, atol=0.1)
    assert view.dimensions() == before.untied()
    assert not view.tied and not model.config.tie_word_embeddings


def test_a_matrix_that_is_not_orthogonal_changes_much() -> None:
    """So the identity above says something."""
    model = in_float64(small())
    expected = logits(model)
    rotate_stream(DecoderView.of(model), orthogonal() * 1.5)
    assert not torch.allclose(logits(model), expected, atol=0.1)


@pytest.mark.parametrize("family", ["granite", "qwen3"])
def test_all_components_are_the_model(family: str) -> None:
    """Nothing is lost where none of them goes, and the dense states are those of the result."""
    model = in_float64(small(family, tie_word_embeddings=True))
    expected = logits(model)
    session = rotated(model, 32)
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-12)
    assert session.reference is not None
    for dense, now in zip(session.reference, session.captured(), strict=True):
        for index in range(3):
            assert torch.allclose(dense.inputs[index], now.inputs[index], rtol=0, atol=1e-12)


def test_a_stream_of_fewer_dimensions_loses_nothing() -> None:
    """Everything that is written lies in 24 directions of no axis: the other 8 go at no cost."""
    model = in_float64(small())
    view, inside = DecoderView.of(model), orthogonal()[:, :24]
    with torch.no_grad():
        view.embedding.weight.copy_(view.embedding.weight @ inside @ inside.T)
        for layer in view.layers:
            for name in ("o_proj", "down_proj"):
                weight = view.projections(layer)[name].weight
                weight.copy_(inside @ inside.T @ weight)
    expected, plain = logits(model), copy.deepcopy(model)
    values, _ = principal_components(view, Session(model, calibration=TOKENS).captured())
    assert float(values[24:].sum()) < 1e-12 < float(values[23])
    session = rotated(model, 24)
    assert session.view.dimensions().hidden_size == 24
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-9)
    apply_operations(plain, [KeepHidden(indices=tuple(range(24)))])
    assert not torch.allclose(logits(in_float64(plain)), expected, atol=0.1)


def test_components_are_those_of_what_the_norms_put_out() -> None:
    """Against hooks on all norms of one whole pass, their weights divided out."""
    model = small("qwen2")
    moments = torch.zeros(32, 32, dtype=torch.float64)
    norms = [n for n, _ in model.named_modules() if n.endswith(("layernorm", "model.norm"))]
    for name in norms:
        states = seen_by(model, name, TOKENS)
        moments += torch.einsum("ti,tj,t->ij", states, states, 32 / states.square().sum(-1))
    batches = Session(model, calibration=TOKENS, batch_tokens=48).captured()
    values, basis = principal_components(DecoderView.of(model), batches)
    assert len(norms) == 5
    assert torch.allclose(basis.T @ basis, torch.eye(32, dtype=torch.float64), atol=1e-12)
    shares = (basis.T @ moments @ basis) / moments.trace()
    assert torch.allclose(shares, values.diag(), atol=1e-6)
    assert torch.equal(values, values.sort(descending=True).values)
    other = orthogonal()[:, :24]
    assert float(values[:24].sum()) > float((other.T @ moments @ other).trace() / moments.trace())


@pytest.mark.parametrize("allocation", ["uniform", "global"])
def test_the_strategy_plans_the_rotation(allocation: str) -> None:
    """With the size that it promises, and what the untied head costs."""
    model = small(tie_word_embeddings=True)
    session = Session(model, calibration=TOKENS, batch_tokens=48)
    plan = session.plan(strategy(0.3, allocation=allocation))
    assert [one.op for one in plan.operations][-2:] == ["rotate_hidden", "keep_hidden"]
    assert PruningPlan.parse(plan.to_json()) == plan
    assert "adds 4,096 parameters" in plan.notes[0]
    assert plan.hidden_scores == tuple(sorted(plan.hidden_scores or (), reverse=True))
    session.apply(plan)
    assert session.view.dimensions() == plan.after
    assert not plan.after.tied_embeddings


def test_an_untied_head_costs_more_than_a_hundred_channels_save() -> None:
    """On the default model: 101 of 576 hidden channels must go before anything is saved."""
    free, first = (SMOLLM2.untied().without_hidden(n).parameters for n in (100, 101))
    assert free > SMOLLM2.parameters > first
    assert SMOLLM2.untied().parameters - SMOLLM2.parameters == 49_152 * 576


def test_the_stock_class_loads_it(tmp_path: Path) -> None:
    """With a head of its own, though the former one was the embedding."""
    session = rotated(small(tie_word_embeddings=True), 24)
    session.model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not stock.config.tie_word_embeddings
    assert torch.equal(logits(stock), logits(session.model))


def test_a_plan_needs_its_calibration_set(tmp_path: Path, reload_here: None) -> None:
    """Without it or with another one, it is refused before anything changes."""
    model = small()
    plan = Session(model, calibration=TOKENS).plan(strategy())
    before = logits(model)
    for tokens, said in ((None, "there is none"), (TOKENS[:5], "there is another one")):
        with pytest.raises(PlanError, match=said):
            Session(model, calibration=tokens).apply(plan)
    with pytest.raises(PlanError, match="there is no basis"):
        apply_operations(model, plan.operations)
    assert torch.equal(logits(model), before)
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(PlanError, match="there is none") as caught:
        apply_plan(plan, ModelSource(id=str(tmp_path / "model")), tmp_path / "applied")
    assert caught.value.hint is not None and "`apply` has no calibration" in caught.value.hint


@pytest.mark.parametrize(
    ("family", "operations", "said"),
    [
        ("gemma2", [RotateHidden(calibration="x")], "the residual stream of Gemma2ForCausalLM"),
        ("llama", [RotateHidden(calibration="x")] * 2, "the plan has rotate_hidden 2 times"),
    ],
)
def test_what_cannot_be_rotated_is_refused(
    family: str, operations: list[RotateHidden], said: str
) -> None:
    """With the reason."""
    with pytest.raises(PlanError, match=said):
        apply_operations(make_model(family, num_hidden_layers=2), operations, basis=orthogonal())


def test_its_restoration_fits_the_rotated_dense_states() -> None:
    """The error of the final state, in the components that are left, falls."""
    dense = small()
    basis = principal_components(
        DecoderView.of(dense), Session(dense, calibration=TOKENS).captured()
    )[1]
    wanted = seen_by(dense, "model.norm", TOKENS) @ basis[:, :24]
    errors = {}
    for restore in ("none", "dense"):
        options = strategy(restore=restore).options.model_dump(mode="json")
        found = prune(small(), None, "width", ratio=0.4, calibration=TOKENS, **options)
        left = seen_by(found.model, "model.norm", TOKENS) - wanted
        errors[restore] = float(left.norm())
    assert errors["dense"] < 0.95 * errors["none"]
