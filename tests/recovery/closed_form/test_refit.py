"""Every refitted projection is the one that least squares over all tokens gives."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from slm_plugin.plans import MergeLayers
from slm_plugin.restoration import least_squares
from slm_plugin.session import Session
from tests.pruners.depth.strategies import layer_outputs
from tests.recovery.pruned import (
    FITTED,
    TOKENS,
    chosen_ridge,
    drop,
    join,
    pruned,
    recover,
    ridge_oracle,
    seen_by,
)
from tests.tiny import make_model


def _refitted(model: PreTrainedModel, place: str, target: torch.Tensor, ridge: float) -> None:
    """Refit one projection by hand, bias included."""
    position = int(place.split(".")[2])
    features = seen_by(model, place)
    now = layer_outputs(model, TOKENS)[position + 1].flatten(0, 1).double()
    linear = model.get_submodule(place)
    assert isinstance(linear, nn.Linear)
    if linear.bias is not None:
        features = torch.cat([features, torch.ones(len(features), 1, dtype=torch.float64)], dim=1)
    lack = target.flatten(0, 1).double() - now
    change = ridge_oracle(features[FITTED], lack[FITTED], ridge)
    with torch.no_grad():
        linear.weight.add_(change[: linear.in_features].T)
        if linear.bias is not None:
            linear.bias.add_(change[-1])


def _error(session: Session, target: torch.Tensor, position: int) -> torch.Tensor:
    return (layer_outputs(session.model, TOKENS)[position + 1] - target).norm()


def _narrow(model: PreTrainedModel) -> None:
    """Cut every MLP to its first 40 channels."""
    for layer in model.model.layers:
        mlp = layer.mlp
        for name, kept in (("gate_proj", 0), ("up_proj", 0), ("down_proj", 1)):
            weight = getattr(mlp, name).weight.detach()
            part = weight[:40] if kept == 0 else weight[:, :40]
            linear = nn.Linear(part.shape[1], part.shape[0], bias=False)
            linear.weight = nn.Parameter(part.clone())
            setattr(mlp, name, linear)


@pytest.mark.parametrize("bias", [False, True])
def test_all_layers_from_the_first_gap_are_refitted_on_refitted_ones(bias: bool) -> None:
    """Each meets what the dense model had at its depth; those below the gap stay untouched."""
    model = make_model(num_hidden_layers=7, mlp_bias=bias, attention_bias=bias)
    states = layer_outputs(model, TOKENS)
    session = pruned(model, drop(2, 4))
    by_hand = copy.deepcopy(model)
    notes = recover("refit", session).notes
    assert [note.split(":")[0] for note in notes] == ["layer 1", "layer 2", "layer 3", "layer 4"]
    for position, target, note in zip((1, 2, 3, 4), (3, 5, 6, 7), notes, strict=True):
        if "ridge" in note:
            place = f"model.layers.{position}.mlp.down_proj"
            _refitted(by_hand, place, states[target], chosen_ridge(note))
    assert "ridge" in notes[0] and "ridge" in notes[1]
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-4)
    assert torch.equal(
        model.model.layers[0].mlp.down_proj.weight, by_hand.model.layers[0].mlp.down_proj.weight
    )


def test_o_proj_goes_first_and_down_proj_sees_it() -> None:
    """The attention's output is refitted on its heads, the MLP's on what then follows."""
    model = make_model()
    states = layer_outputs(model, TOKENS)
    session = pruned(model, drop(2, 3))
    by_hand = copy.deepcopy(model)
    out, down = recover("refit", session, o_proj=True, layers="boundaries").notes
    assert out.startswith("layer 1 o_proj: ridge") and down.startswith("layer 1: ridge")
    if "undone" not in out:
        _refitted(by_hand, "model.layers.1.self_attn.o_proj", states[4], chosen_ridge(out))
    _refitted(by_hand, "model.layers.1.mlp.down_proj", states[4], chosen_ridge(down))
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("loud", [1.0, 8.0])
def test_an_o_proj_that_makes_it_worse_is_undone(loud: float) -> None:
    """When the MLP answers the new attention with more error, the former weight stays."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight.mul_(loud)
    session = pruned(model, drop(2, 3))
    out = model.model.layers[1].self_attn.o_proj
    former = out.weight.detach().clone()
    first, second = recover("refit", session, o_proj=True, layers="boundaries").notes
    assert ("undone" in first) == torch.equal(out.weight, former) == (loud > 1)
    held_out = [float(note.split("error ")[1].split("%")[0]) for note in (first, second)]
    assert held_out[1] <= held_out[0]


def test_a_planted_weight_is_recovered() -> None:
    """A layer whose output projection was spoilt gets it back, for the data demand it."""
    model = make_model()
    session = pruned(model)
    down = model.model.layers[2].mlp.down_proj
    intact = down.weight.detach().clone()
    with torch.no_grad():
        down.weight.add_(0.05 * torch.randn(down.weight.shape))
    session.sources = ((0, 0), (1, 1), (2, 3), (3, 3), (4, 4), (5, 5))
    spoilt = (down.weight.detach() - intact).norm()
    recover("refit", session, layers="boundaries")
    assert (down.weight.detach() - intact).norm() < 0.05 * spoilt


@pytest.mark.parametrize(
    ("operation", "position", "target"),
    [
        (drop(2, 3), 1, 4),
        (drop(5), 4, 6),
        (MergeLayers(first=2, last=4), 2, 5),
        (MergeLayers(first=4, last=5), 4, 6),
        (join(2), 2, 4),
        (join(4), 4, 6),
    ],
)
@pytest.mark.parametrize("o_proj", [False, True])
def test_the_state_comes_nearer_to_the_original(
    family: str, operation: object, position: int, target: int, o_proj: bool
) -> None:
    """Behind the first refitted layer, after drops and after merges."""
    model = make_model(family)
    wanted = layer_outputs(model, TOKENS)[target]
    session = pruned(model, operation)  # type: ignore[arg-type]
    before = _error(session, wanted, position)
    recover("refit", session, o_proj=o_proj)
    assert _error(session, wanted, position) < 0.98 * before


def test_an_endless_ridge_is_plain_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stronger the ridge, the less the weights move."""
    moved = []
    for ridge in (1e-4, 1e2, 1e12):
        monkeypatch.setattr(least_squares, "RIDGES", (ridge,))
        session = pruned(make_model(), drop(2, 3))
        plain = session.view.layers[1].mlp.down_proj.weight.detach().clone()
        recover("refit", session, layers="boundaries")
        moved.append((session.view.layers[1].mlp.down_proj.weight.detach() - plain).norm().item())
    assert moved[0] > moved[1] > moved[2]
    assert moved[2] < 1e-6


def test_layers_missing_at_the_bottom_leave_every_layer_to_refit() -> None:
    """The lowest layer that is left sees something else, so the refit begins with it."""
    notes = recover("refit", pruned(make_model(), drop(0))).notes
    assert notes[0] == (
        "layer 0 is missing at the bottom, and no layer before them can be repaired"
    )
    assert [note.split(":")[0] for note in notes[1:]] == [f"layer {index}" for index in range(5)]


def test_narrower_layers_are_refitted_without_a_gap() -> None:
    """After width pruning no layer is missing and yet every one has something to meet."""
    model = make_model()
    states = layer_outputs(model, TOKENS)
    dense = pruned(model)
    _narrow(model)
    session = Session(model, calibration=TOKENS, batch_tokens=32)
    session.reference, session.original = dense.reference, dense.original
    before = _error(session, states[1], 0)
    notes = recover("refit", session).notes
    assert [note.split(":")[0] for note in notes] == [f"layer {index}" for index in range(6)]
    assert _error(session, states[1], 0) < 0.9 * before
    assert "no layer is missing" in recover("refit", session, layers="boundaries").notes[0]
