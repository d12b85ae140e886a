"""What holds for every recovery that repairs boundaries in closed form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from slm_plugin.comparison.run import compare
from slm_plugin.errors import CalibrationError, NumericalError, UnsupportedModelError
from slm_plugin.models.fingerprint import fingerprint
from slm_plugin.pipeline import plan, run
from slm_plugin.plans import MergeLayers
from slm_plugin.pruners.depth.sleb import Sleb
from slm_plugin.restoration.boundaries import boundaries, target_of
from slm_plugin.session import Session
from tests.pruners.depth.strategies import make_identity
from tests.recovery.pruned import TOKENS, drop, join, pruned, recover
from tests.tiny import make_checkpoint, make_model

FITTED = [
    pytest.param("fold_linear", {}, id="fold_linear"),
    pytest.param("refit", {}, id="refit"),
    pytest.param("refit", {"o_proj": True, "layers": "boundaries"}, id="refit-o_proj-boundaries"),
]
STOCK = [*FITTED, pytest.param("rescale", {}, id="rescale")]
GHOST = pytest.param("ghost", {}, id="ghost")
ALL = [*STOCK, GHOST, pytest.param("linear_patch", {}, id="linear_patch")]
REPAIRS = ("fold_linear", "refit", "rescale")


@torch.no_grad()
def logits(model: PreTrainedModel) -> torch.Tensor:
    """Logits of all calibration tokens."""
    found: torch.Tensor = model(TOKENS).logits
    return found


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A copy of every weight."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(model: PreTrainedModel, before: dict[str, torch.Tensor]) -> set[str]:
    """Names of the weights that are no longer what they were, bit by bit."""
    after = model.state_dict()
    return {name for name, value in before.items() if not torch.equal(after[name], value)}


def test_boundaries_are_where_layers_are_missing_or_merged() -> None:
    """Each knows which state of the dense model is wanted behind it; the bottom has none."""
    session = pruned(make_model(num_hidden_layers=10), drop(0, 3, 9), MergeLayers(first=5, last=6))
    assert session.sources == ((1, 1), (2, 2), (4, 4), (5, 6), (7, 7), (8, 8))
    assert boundaries(session) == [1, 3, 5]
    assert [target_of(session, position) for position in range(6)] == [2, 4, 5, 7, 8, 10]


def test_a_layer_of_two_halves_is_a_boundary() -> None:
    """Layer 2's attention before layer 3's MLP owes what layer 3 gave."""
    session = pruned(make_model(), join(2))
    assert session.sources == ((0, 0), (1, 1), (2, 3), (4, 4), (5, 5))
    assert boundaries(session) == [2] and target_of(session, 2) == 4


@pytest.mark.parametrize(("name", "options"), ALL)
def test_layers_that_did_nothing_leave_nothing_to_repair(
    family: str, name: str, options: dict[str, object]
) -> None:
    """When identity layers go, no weight and no logit changes."""
    model = make_model(family)
    make_identity(model, [2, 3])
    dense = logits(model)
    session = pruned(model, drop(2, 3))
    before = weights(model)
    recover(name, session, **options)
    assert not changed(model, before)
    assert torch.equal(logits(model), dense)


@pytest.mark.parametrize(("name", "options"), STOCK)
def test_a_repaired_model_is_a_stock_model(
    family: str, name: str, options: dict[str, object], tmp_path: Path
) -> None:
    """Shapes stay, and transformers alone reads back what computes the same logits."""
    model = make_model(family, tie_word_embeddings=True)
    session = pruned(model, drop(2, 3))
    before, dimensions = weights(model), session.view.dimensions()
    recover(name, session, **options)
    assert changed(model, before)
    assert session.view.dimensions() == dimensions
    model.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert torch.equal(logits(loaded), logits(model))


@pytest.mark.parametrize(("name", "options"), ALL)
def test_batches_do_not_matter(name: str, options: dict[str, object]) -> None:
    """One sample a batch, or all samples in one, give the same model."""
    repaired = []
    for tokens in (32, 16, 10_000):
        session = pruned(make_model(), drop(1, 4), batch_tokens=tokens)
        recover(name, session, **options)
        repaired.append(logits(session.model))
    for other in repaired[1:]:
        torch.testing.assert_close(repaired[0], other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "options"), STOCK)
def test_bfloat16_stays(name: str, options: dict[str, object]) -> None:
    """Sums are in float64, weights remain in the model's number format."""
    session = pruned(make_model().to(torch.bfloat16), drop(2, 3))
    before = weights(session.model)
    recover(name, session, **options)
    assert changed(session.model, before)
    assert {p.dtype for p in session.model.parameters()} == {torch.bfloat16}
    assert all(p.requires_grad for p in session.model.parameters())
    assert torch.isfinite(logits(session.model)).all()


@pytest.mark.parametrize(("name", "options"), ALL)
def test_nothing_missing_is_said_and_changes_nothing(name: str, options: dict[str, object]) -> None:
    """Before any pruning there is no boundary."""
    session = Session(make_model(), calibration=TOKENS)
    session.keep_reference()
    before = weights(session.model)
    record = recover(name, session, **options)
    assert record.notes == ("no layer is missing: nothing to repair",)
    assert not changed(session.model, before)


@pytest.mark.parametrize(("name", "options"), ALL)
def test_nan_is_one_error_and_leaves_the_model(name: str, options: dict[str, object]) -> None:
    """Also what was repaired before the NaN comes back, and no hook stays."""
    session = pruned(make_model(num_hidden_layers=8), drop(2, 5))
    with torch.no_grad():
        session.view.layers[3].mlp.gate_proj.weight[0] = float("nan")
    before = weights(session.model)
    with pytest.raises(NumericalError, match="NaN"):
        recover(name, session, **options)
    after = session.model.state_dict()
    assert all(torch.equal(after[n].nan_to_num(), before[n].nan_to_num()) for n in before)
    assert not any(module._forward_pre_hooks for module in session.model.modules())


@pytest.mark.parametrize(("name", "options"), ALL)
def test_a_missing_reference_is_one_error(name: str, options: dict[str, object]) -> None:
    """Not kept, or kept after pruning: the message names the recovery and the remedy."""
    session = Session(make_model(), calibration=TOKENS)
    with pytest.raises(CalibrationError, match=rf"{name} .*keep_reference"):
        recover(name, session, **options)
    late = pruned(make_model(), drop(2))
    late.release()
    late.keep_reference()
    with pytest.raises(
        CalibrationError, match=r"recorded with 5 layers; the model was loaded with 6"
    ):
        recover(name, late, **options)


@pytest.mark.parametrize(("name", "options"), ALL)
def test_another_hidden_size_is_one_error(name: str, options: dict[str, object]) -> None:
    """States of different width cannot be compared."""
    session = Session(make_model(hidden_size=24), calibration=TOKENS)
    session.reference = pruned(make_model()).reference
    with pytest.raises(UnsupportedModelError, match="32 features with states of 24"):
        recover(name, session, **options)


@pytest.mark.parametrize(("name", "options"), [*FITTED, GHOST])
def test_one_sample_is_too_few(name: str, options: dict[str, object]) -> None:
    """Nothing could be held out; the model stays as it is."""
    session = pruned(make_model(), drop(2), calibration=TOKENS[:1])
    before = fingerprint(session.model)
    with pytest.raises(CalibrationError, match=r"layer 1 .* fewer than 2 calibration samples"):
        recover(name, session, **options)
    assert fingerprint(session.model) == before


@pytest.mark.parametrize("name", ["fold_linear", "refit", "ghost", "streamline"])
def test_one_sample_is_refused_before_anything_is_searched(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By runs, by plans of later stages and by comparisons, whichever strategy comes first."""
    make_checkpoint(tmp_path / "model")
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(TOKENS[:1].tolist()))
    head = f"""version: 1
model: {{id: {tmp_path / "model"}, device: cpu}}
calibration: {{source: {ids}}}
output: {tmp_path / "out"}
"""
    recipe, contest = tmp_path / "recipe.yaml", tmp_path / "contest.yaml"
    stages = f"stages: [{{prune: sleb, target: {{layers_removed: 2}}}}, {{recover: {name}}}]\n"
    recipe.write_text(head + stages)
    contest.write_text(
        f"{head}methods: [{{prune: sleb, recover: [{{recover: {name}}}]}}]\n"
        f"targets: [{{layers_removed: 2}}]\n"
        f"evaluate: [footprint: {{tokens: 16}}]\n"
    )
    monkeypatch.setattr(Sleb, "plan", lambda *_: pytest.fail("searched"))
    for work in (lambda: run(recipe), lambda: plan(recipe), lambda: compare(contest)):
        with pytest.raises(CalibrationError) as caught:
            work()
        assert caught.value.message == (
            f"'{name}' needs 2 calibration samples or more; the set has 1"
        )
    assert not (tmp_path / "out").exists()


def test_a_recipe_repairs_what_it_pruned(tokens: Path, tmp_path: Path) -> None:
    """After a merge by slm the run keeps the reference, and every repair tells of its layers."""
    make_checkpoint(tmp_path / "model")
    stages = "".join(f"  - {{recover: {name}}}\n" for name in REPAIRS)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"""version: 1
model: {{id: {tmp_path / "model"}, device: cpu}}
calibration: {{source: {tokens}}}
stages:
  - {{prune: slm, target: {{layers_removed: 2}}}}
{stages}output: {tmp_path / "out"}
"""
    )
    for stage in run(recipe).report.stages[1:]:
        assert stage.recovery is not None and stage.recovery.recovery == stage.name
        assert any(note.startswith("layer ") for note in stage.recovery.notes)
