"""Ghosted layers and LinearPatch: the operators are those of the formulas, in the right places."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import torch

from slm_plugin.calibration.held_out import is_held_out
from slm_plugin.errors import (
    NumericalError,
    PlanError,
    RecipeError,
    UnsupportedModelError,
)
from slm_plugin.export.checkpoint import save_checkpoint
from slm_plugin.models.operators import operators
from slm_plugin.pipeline import run
from slm_plugin.plans import MergeLayers
from slm_plugin.pruners.depth.repaired import Repaired
from slm_plugin.pruners.depth.repaired_options import RepairedOptions
from slm_plugin.recipe import Recipe
from slm_plugin.recovery.closed_form import ghost, linear_patch
from slm_plugin.restoration import least_squares
from slm_plugin.restoration.layer_walk import LayerBatch
from slm_plugin.target import Target
from tests.pruners.depth.strategies import layer_outputs
from tests.recovery.pruned import (
    FITTED,
    TOKENS,
    chosen_ridge,
    drop,
    join,
    pruned,
    recover,
    remove,
    ridge_oracle,
)
from tests.tiny import make_checkpoint, make_model

BOTH = ("ghost", "linear_patch")


def _gap(seed: int, noise: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """States of 40 samples, a matrix, and what the matrix makes of the states."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(40, 16, 32, generator=generator)
    matrix = torch.eye(32) + 0.3 * torch.randn(32, 32, generator=generator)
    extra = noise * torch.randn(40, 16, 32, generator=generator)
    return states, matrix, states @ matrix + extra


def _seen(states: torch.Tensor, targets: torch.Tensor) -> Callable[[], Iterable[LayerBatch]]:
    """What an walk shows of them, eight samples a batch."""
    return lambda: (
        LayerBatch(start, states[start : start + 8], states[start : start + 8], targets[start:][:8])
        for start in range(0, len(states), 8)
    )


def test_ghost_recovers_a_planted_map() -> None:
    """Where a matrix led from one state to the other, that matrix is found."""
    states, matrix, targets = _gap(0)
    found, note = ghost._fitted(_seen(states, targets), "layer 1")
    assert found is not None
    torch.testing.assert_close(found, matrix.double(), rtol=0, atol=1e-3)
    assert note.startswith("ridge 0.0001, held-out error ")


def test_linear_patch_of_a_scaled_stream_is_the_scale() -> None:
    """X* = cX gives D = c, so P = cI; an equal stream needs no operator."""
    states, _, _ = _gap(1)
    found, _ = linear_patch._patched(_seen(states, 1.5 * states), "layer 1")
    assert found is not None
    torch.testing.assert_close(found, 1.5 * torch.eye(32, dtype=torch.float64))
    assert linear_patch._patched(_seen(states, states), "layer 1")[0] is None


def test_linear_patch_by_hand() -> None:
    """The matrix of the formula, from all tokens at once, symmetric; its error is the one told."""
    states, _, targets = _gap(2, noise=0.3)
    found, note = linear_patch._patched(_seen(states, targets), "layer 1")
    from scipy.linalg import hadamard

    rotation = torch.tensor(hadamard(32), dtype=torch.float64) / 32**0.5
    now, wanted = ((x.double().flatten(0, 1) @ rotation).abs().mean(0) for x in (states, targets))
    by_hand = rotation @ torch.diag(wanted / now) @ rotation.T
    assert found is not None
    torch.testing.assert_close(found, by_hand)
    torch.testing.assert_close(found, found.T)
    error = (states.double() @ by_hand - targets.double()).norm() / targets.double().norm()
    assert note.endswith(f"to {float(error):.2%}")


@pytest.mark.parametrize(("width", "block"), [(32, 32), (48, 16), (9, 1), (576, 64)])
def test_hadamard_is_orthonormal(width: int, block: int) -> None:
    """Blocks of the largest power of two that divides the width, all entries of one size."""
    matrix = linear_patch.hadamard(width)
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width, dtype=torch.float64))
    assert int((matrix[0] != 0).sum()) == block
    sizes = matrix.abs().unique()
    assert sizes[-1] == pytest.approx(block**-0.5) and len(sizes) <= 2


def test_ghost_is_the_unconstrained_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """On what it was fitted on no linear map is better: not LinearPatch, not plain removal."""
    monkeypatch.setattr(least_squares, "RIDGES", (1e-12,))
    states, _, targets = _gap(3, noise=2.0)
    found, _ = ghost._fitted(_seen(states, targets), "layer 1")
    patch, _ = linear_patch._patched(_seen(states, targets), "layer 1")
    assert found is not None and patch is not None
    fitted = ~is_held_out(torch.arange(40))
    x, y = states[fitted].double(), targets[fitted].double()
    ghosted, patched, plain = (
        float((x @ m - y).norm()) for m in (found, patch, torch.eye(32).double())
    )
    assert ghosted < patched
    assert ghosted < plain


@torch.no_grad()
@pytest.mark.parametrize(
    ("operation", "target"), [(drop(2, 3), 4), (MergeLayers(first=1, last=3), 4), (join(1), 3)]
)
def test_ghost_by_hand_in_a_model(family: str, operation: object, target: int) -> None:
    """The stream behind the gap is what ridge least squares over all tokens makes of it."""
    model = make_model(family)
    wanted = layer_outputs(model, TOKENS)[target]
    session = pruned(model, operation)  # type: ignore[arg-type]
    plain = layer_outputs(model, TOKENS)[2]
    note, added = recover("ghost", session).notes
    assert added == "operators added: 1 of 32 x 32; only the onnx export stores them"
    x, y = (s.flatten(0, 1).double() for s in (plain, wanted))
    change = ridge_oracle(x[FITTED], (y - x)[FITTED], chosen_ridge(note))
    by_hand = (x + x @ change).float().view_as(plain)
    torch.testing.assert_close(layer_outputs(model, TOKENS)[2], by_hand, rtol=1e-3, atol=1e-3)
    assert list(operators(model)) == ["model.layers.1"]


@torch.no_grad()
@pytest.mark.parametrize("name", BOTH)
def test_an_upper_gap_is_seen_behind_the_lower_operator(name: str) -> None:
    """What is found for it is found on the stream as the model with the lower one computes it."""
    model = make_model(num_hidden_layers=8)
    dense = layer_outputs(model, TOKENS)
    session = pruned(model, drop(2, 5))
    recover(name, session)
    first, second = operators(model).values()
    without = copy.deepcopy(model)
    operators(without)["model.layers.3"].weight.copy_(torch.eye(32))
    states = layer_outputs(without, TOKENS)[4]
    find = ghost._fitted if name == "ghost" else linear_patch._patched
    found, _ = find(_seen(states, dense[6]), "layer 3")
    assert found is not None
    torch.testing.assert_close(second.weight.T.double(), found, rtol=1e-2, atol=1e-2)
    assert not torch.allclose(first.weight, second.weight, atol=1e-2)


@pytest.mark.parametrize("name", BOTH)
def test_layers_missing_at_the_bottom_and_at_the_top(name: str) -> None:
    """The embedding stands before the first, and the last layer's output has a place as well."""
    model = make_model(tie_word_embeddings=True)
    session = pruned(model, drop(0, 5))
    notes = recover(name, session).notes
    assert [note.split(":")[0] for note in notes[:-1]] == ["the embedding", "layer 3"]
    assert list(operators(model)) == ["model.embed_tokens", "model.layers.3"]


@pytest.mark.parametrize("name", BOTH)
def test_operators_take_the_number_format(name: str) -> None:
    """Sums are in float64, the operator is in the model's format."""
    session = pruned(make_model().to(torch.bfloat16), drop(2, 3))
    recover(name, session)
    assert {p.dtype for p in session.model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(session.model(TOKENS).logits).all()


def test_a_channel_that_is_always_zero_is_one_error() -> None:
    """LinearPatch has nothing to scale there; the model stays as it is."""
    model = make_model()
    session = pruned(model, drop(0))
    with torch.no_grad():
        model.model.embed_tokens.weight.zero_()
    with pytest.raises(NumericalError, match=r"behind the embedding .* always zero"):
        recover("linear_patch", session)
    assert not operators(model)


@pytest.mark.parametrize("name", BOTH)
def test_nothing_that_would_lose_them_comes_after(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No second repair, no pruning and no checkpoint: each says so in one line."""
    session = pruned(make_model(), MergeLayers(first=2, last=4))
    recover(name, session)
    for repair in ("refit", "rescale", "streamline", name):
        with pytest.raises(
            UnsupportedModelError, match=f"{repair} cannot repair a model that has operators"
        ):
            recover(repair, session)
    with pytest.raises(PlanError, match="the model has operators"):
        remove(session, drop(1))
    # Before any search.
    search = Repaired(RepairedOptions(), Target(layers_removed=1))
    with pytest.raises(PlanError, match="the model has operators"), monkeypatch.context() as m:
        m.setattr(Repaired, "plan", None)
        session.plan(search)
    with pytest.raises(UnsupportedModelError, match=r"no checkpoint .*export `onnx`"):
        save_checkpoint(session, tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())


def _recipe(folder: Path, tokens: Path, stages: list[str], *ending: str) -> str:
    entries = "".join(f"  - {stage}\n" for stage in stages)
    exports = "".join(f"  - {exporter}\n" for exporter in ending)
    return f"""version: 1
model: {{id: {folder / "model"}, device: cpu}}
calibration: {{source: {tokens}}}
stages:
{entries}{"export:" if exports else ""}
{exports}output: {folder / "out"}
"""


PRUNE = "{prune: deepest, target: {layers_removed: 2}}"


@pytest.mark.parametrize("name", BOTH)
def test_a_recipe_tells_before_anything_is_loaded(name: str, tmp_path: Path, tokens: Path) -> None:
    """Stages and exports that cannot be behind operators are mistakes of the file."""
    stages = [PRUNE, f"{{recover: {name}}}", PRUNE, "{recover: rescale}"]
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(_recipe(tmp_path, tokens, stages, "checkpoint: {}"))
    message = str(caught.value)
    assert f"stages.2: 'deepest' cannot follow '{name}'" in message
    assert f"stages.3: 'rescale' cannot follow '{name}'" in message
    assert f"'checkpoint' cannot store the operators that '{name}' inserts" in message


@pytest.mark.parametrize("name", BOTH)
def test_a_recipe_runs_with_them(name: str, tmp_path: Path, tokens: Path) -> None:
    """LoRA may follow; the report counts the operators as parameters."""
    make_checkpoint(tmp_path / "model")
    stages = [PRUNE, f"{{recover: {name}}}", "{recover: lora, epochs: 1}"]
    (tmp_path / "recipe.yaml").write_text(_recipe(tmp_path, tokens, stages))
    report = run(tmp_path / "recipe.yaml").report
    assert report.after.parameters == report.stages[0].after.parameters + 32 * 32
    assert report.stages[1].recovery is not None
    assert report.stages[1].recovery.notes[0].startswith("layer 2: ")
