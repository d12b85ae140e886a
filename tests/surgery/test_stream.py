"""Rotation of the residual stream, and the removal of its last principal components."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

pytest.importorskip("torch_pruning")

from slm_plugin import prune
from slm_plugin.calibration.components import principal_components, stream_components
from slm_plugin.errors import PlanError, RecipeError
from slm_plugin.models.dimensions import BasisOf
from slm_plugin.models.loading import ModelSource
from slm_plugin.models.operators import operators
from slm_plugin.models.view import DecoderView
from slm_plugin.pipeline import apply_plan
from slm_plugin.plans import KeepHidden, PruningPlan, RotateHidden
from slm_plugin.plans.stream import StreamChange
from slm_plugin.pruners.width.width import Width
from slm_plugin.pruners.width.width_options import WidthOptions
from slm_plugin.recipe import Recipe
from slm_plugin.session import Session
from slm_plugin.surgery import apply_operations
from slm_plugin.surgery.stream import change_stream
from slm_plugin.target import Target
from tests.recovery.pruned import seen_by
from tests.surgery.test_hidden import REMOVABLE, in_float64, logits, small
from tests.tiny import SMOLLM2, make_checkpoint, make_model, make_tokenizer, random_tokens

TOKENS = random_tokens(10, 12)
BOTH = pytest.mark.parametrize("per", ["model", "block"])


def orthogonal(*count: int) -> Tensor:
    """A random orthogonal matrix in float64, or some of them."""
    generator = torch.Generator().manual_seed(4)
    found: Tensor = torch.linalg.qr(
        torch.randn(*count, 32, 32, generator=generator, dtype=torch.float64)
    ).Q
    return found


def turn(model: PreTrainedModel, per: BasisOf, basis: Tensor) -> None:
    """Rotate the stream of a model and remove nothing."""
    view = DecoderView.of(model)
    change = StreamChange(rotation=RotateHidden(calibration="", per=per))
    change_stream(view, change, basis, change.after(view.dimensions()))


def strategy(ratio: float = 0.4, **options: Any) -> Width:
    """The strategy by the shared rotation, with another score for MLP channels."""
    settings = {"hidden_channels": 8, "hidden_score": "pca", "multiple_of": 4, "restore": "none"}
    made = WidthOptions.model_validate({"score": "wanda_sp", **settings, **options})
    return Width(made, Target(ratio=ratio))


def rotated(model: PreTrainedModel, kept: int, per: BasisOf = "model") -> Session:
    """A session whose stream was rotated, and keeps its first components."""
    session = Session(model, calibration=TOKENS, batch_tokens=48)
    session.keep_reference()
    before = session.view.dimensions()
    after = before.without_hidden(before.hidden_size - kept, rotated=per)
    operations = (
        RotateHidden(calibration=str(session.digest), per=per),
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


@BOTH
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", REMOVABLE)
def test_a_rotation_alone_changes_nothing(family: str, tied: bool, per: BasisOf) -> None:
    """In float64 to the last digits, whatever orthogonal matrices they are; the head is untied."""
    model = in_float64(small(family, tie_word_embeddings=tied))
    view = DecoderView.of(model)
    before, expected = view.dimensions(), logits(model)
    former = view.embedding.weight.detach().clone()
    turn(model, per, orthogonal(*([5] if per == "block" else [])))
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-12)
    assert not torch.allclose(view.embedding.weight, former, atol=0.1)
    assert view.dimensions() == before.without_hidden(0, rotated=per)
    assert len(operators(model)) == (4 if per == "block" else 0)
    assert not view.tied and not model.config.tie_word_embeddings


@BOTH
def test_a_matrix_that_is_not_orthogonal_changes_much(per: BasisOf) -> None:
    """So the identity above says something."""
    model = in_float64(small())
    expected = logits(model)
    turn(model, per, orthogonal(*([5] if per == "block" else [])) * 1.5)
    assert not torch.allclose(logits(model), expected, atol=0.1)


@BOTH
@pytest.mark.parametrize("family", ["granite", "qwen3"])
def test_all_components_are_the_model(family: str, per: BasisOf) -> None:
    """Nothing is lost where none of them goes, and the dense states are those of the result."""
    model = in_float64(small(family, tie_word_embeddings=True))
    expected = logits(model)
    session = rotated(model, 32, per)
    assert torch.allclose(logits(model), expected, rtol=0, atol=1e-12)
    if per == "block":
        assert session.reference is None
        return
    assert session.reference is not None
    for dense, now in zip(session.reference, session.captured(), strict=True):
        for index in range(3):
            assert torch.allclose(dense.inputs[index], now.inputs[index], rtol=0, atol=1e-12)


@BOTH
def test_a_stream_of_fewer_dimensions_loses_nothing(per: BasisOf) -> None:
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
    session = rotated(model, 24, per)
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


@torch.no_grad()
@pytest.mark.parametrize("family", ["granite", "llama", "qwen3"])
def test_a_rotation_of_every_block_is_slicegpt(family: str) -> None:
    """Against its algorithm by hand: every block reads the leading components of what comes."""
    model = in_float64(small(family))
    view = DecoderView.of(model)
    session = Session(model, calibration=TOKENS, batch_tokens=10_000)
    (batch,) = session.captured()
    _, bases = stream_components(view, [batch], "block", 24)
    found: list[Tensor] = []

    def cut(states: Tensor) -> Tensor:
        rows = states.flatten(0, 1)
        found.append(torch.linalg.svd(rows).Vh[:24])
        return states @ found[-1].T @ found[-1]

    stream, added = batch.inputs[0], view.residual_multiplier
    for layer, said in zip(view.layers, batch.arguments, strict=True):
        stream = cut(stream)
        read = layer.input_layernorm(stream)
        stream = cut(stream + added * layer.self_attn(hidden_states=read, **said)[0])
        stream = stream + added * layer.mlp(layer.post_attention_layernorm(stream))
    expected = view.logits(model.model.norm(cut(stream)))
    assert len(found) == len(bases) == 5
    for mine, basis in zip(found, bases, strict=True):
        assert torch.allclose(basis.T @ basis, torch.eye(32, dtype=torch.float64), atol=1e-12)
        assert torch.allclose(mine.T @ mine, basis[:, :24] @ basis[:, :24].T, atol=1e-9)
    plain = model(TOKENS).logits
    sliced = rotated(model, 24, "block").model
    assert torch.allclose(sliced(TOKENS).logits, expected, rtol=0, atol=1e-9)
    assert not torch.allclose(plain, expected, atol=1e-2)
    assert torch.equal(copy.deepcopy(sliced)(TOKENS).logits, sliced(TOKENS).logits)


ROTATION = {
    "pca": "adds 4,096 parameters: ",
    "pca_per_block": "and inserts 4 operators, which adds",
}


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("hidden_score", ROTATION)
def test_the_strategy_plans_the_rotation(allocation: str, hidden_score: str) -> None:
    """With the size that it promises, and what the untied head and the operators cost."""
    model = small(tie_word_embeddings=True)
    session = Session(model, calibration=TOKENS, batch_tokens=48)
    plan = session.plan(strategy(0.25, allocation=allocation, hidden_score=hidden_score))
    assert [one.op for one in plan.operations][-2:] == ["rotate_hidden", "keep_hidden"]
    assert PruningPlan.parse(plan.to_json()) == plan
    assert ROTATION[hidden_score] in plan.notes[0]
    assert plan.hidden_scores == tuple(sorted(plan.hidden_scores or (), reverse=True))
    session.apply(plan)
    assert session.view.dimensions() == plan.after
    assert not plan.after.tied_embeddings
    wanted = 0.25 * plan.before.parameters
    assert plan.before.parameters - plan.after.parameters == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("tied", [False, True])
def test_the_plan_says_when_a_rotation_for_every_block_saves(tied: bool) -> None:
    """At that number of channels and not before it."""
    model = small(tie_word_embeddings=tied)
    before = DecoderView.of(model).dimensions()
    plan = Session(model, calibration=TOKENS).plan(strategy(0.3, hidden_score="pca_per_block"))
    note = plan.notes[0]
    least = int(re.findall(r"(\d+) hidden channels must go before", note)[0])
    sizes = [before.without_hidden(n, rotated="block").parameters for n in (least - 1, least)]
    assert sizes[0] > before.parameters >= sizes[1]
    added = before.without_hidden(0, rotated="block").parameters - before.parameters
    assert f"adds {added:,} parameters" in note
    assert ("unties" in note) == tied


def test_what_follows_a_rotation_for_every_block_is_refused(tmp_path: Path) -> None:
    """Its operators are in no checkpoint, and nothing behind them is pruned or repaired."""
    stage = {"prune": "width", "hidden_channels": 8, "hidden_score": "pca_per_block"}
    stage.update({"score": "wanda_sp", "restore": "none", "target": {"ratio": 0.3}})
    recipe = {
        "model": {"id": str(make_checkpoint(tmp_path))},
        "calibration": {"source": "builtin"},
        "stages": [
            stage,
            {"prune": "deepest", "target": {"layers_removed": 1}},
            {"recover": "refit"},
        ],
        "export": [{"checkpoint": {}}],
    }
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(recipe)
    message = str(caught.value)
    assert "'deepest' cannot follow 'width', which inserts operators; " in message
    assert "'refit' cannot follow 'width'" in message
    assert "'checkpoint' cannot store the operators that 'width' inserts; " in message
    assert "export `onnx`, or set `hidden_score: pca`" in message
    session = rotated(small(), 24, "block")
    with pytest.raises(PlanError, match="the model has operators"):
        session.apply(session.plan(strategy(hidden_channels=0, hidden_score=None, ratio=0.2)))


def test_a_rotation_of_every_block_keeps_the_first_components() -> None:
    """The bases are computed for these; one basis may lose any."""
    before = DecoderView.of(small()).dimensions()
    for per in ("model", "block"):
        turned = RotateHidden(calibration="", per=per)
        StreamChange(tuple(range(24)), turned).check(before)
        change = StreamChange(tuple(range(8, 32)), turned)
        if per == "model":
            change.check(before)
            continue
        with pytest.raises(PlanError, match="keeps other hidden channels than the first ones"):
            change.check(before)


def test_an_untied_head_costs_more_than_a_hundred_channels_save() -> None:
    """On the default model 101 of 576 channels must go before anything is saved, or 141."""
    free, first = (SMOLLM2.without_hidden(n, rotated="model").parameters for n in (100, 101))
    assert free > SMOLLM2.parameters > first
    assert SMOLLM2.untied().parameters - SMOLLM2.parameters == 49_152 * 576
    free, first = (SMOLLM2.without_hidden(n, rotated="block").parameters for n in (140, 141))
    assert free > SMOLLM2.parameters > first


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
