"""The map that is folded is the one that least squares over all tokens gives."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from slm_plugin.plans import MergeLayers
from slm_plugin.restoration import least_squares
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
    written_by,
)
from tests.tiny import make_model


def _folded(model: PreTrainedModel, position: int, target: torch.Tensor, ridge: float) -> None:
    """Fold by hand what brings the state behind a layer to its target."""
    mlp = written_by(model, f"model.layers.{position}.mlp")
    now = layer_outputs(model, TOKENS)[position + 1].flatten(0, 1).double()
    mapped = torch.eye(mlp.shape[1], dtype=torch.float64)
    lack = target.flatten(0, 1).double() - now
    mapped += ridge_oracle(mlp[FITTED], lack[FITTED], ridge)
    down = model.model.layers[position].mlp.down_proj
    with torch.no_grad():
        down.weight.copy_(mapped.T @ down.weight.double())
        if down.bias is not None:
            down.bias.copy_(mapped.T @ down.bias.double())


def _down(model: PreTrainedModel, position: int) -> torch.nn.Linear:
    found: torch.nn.Linear = model.model.layers[position].mlp.down_proj
    return found


def test_two_boundaries_are_repaired_from_the_bottom_up() -> None:
    """The second is fitted on what the repaired model computes, with the original as target."""
    model = make_model(num_hidden_layers=8, mlp_bias=True, attention_bias=True)
    states = layer_outputs(model, TOKENS)
    session = pruned(model, drop(2, 5))
    by_hand = copy.deepcopy(model)
    notes = recover("fold_linear", session).notes
    assert [note.split(":")[0] for note in notes] == ["layer 1", "layer 3"]
    for position, target, note in ((1, states[3], notes[0]), (3, states[6], notes[1])):
        _folded(by_hand, position, target, chosen_ridge(note))
        expected, found = _down(by_hand, position), _down(model, position)
        torch.testing.assert_close(found.weight, expected.weight, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.bias, expected.bias, rtol=1e-4, atol=1e-5)
    for position in (0, 2, 4, 5):
        assert torch.equal(_down(model, position).weight, _down(by_hand, position).weight)


def test_a_planted_map_is_recovered() -> None:
    """When the layer's own MLP was spoilt by a known map, folding undoes it."""
    model = make_model()
    session = pruned(model)
    generator = torch.Generator().manual_seed(3)
    planted = torch.eye(32) + 0.05 * torch.randn(32, 32, generator=generator)
    down = _down(model, 2)
    intact = down.weight.detach().clone()
    with torch.no_grad():
        down.weight.copy_(planted.T @ intact)
    session.sources = ((0, 0), (1, 1), (2, 3), (3, 3), (4, 4), (5, 5))
    # Position 2 counts as a merged run, whose output the dense model had before layer 3.
    recover("fold_linear", session)
    torch.testing.assert_close(down.weight, intact, rtol=0, atol=2e-3)


@pytest.mark.parametrize(
    ("operation", "position", "target"),
    [
        (drop(2, 3), 1, 4),
        (drop(4, 5), 3, 6),
        (drop(5), 4, 6),
        (MergeLayers(first=2, last=4), 2, 5),
        (MergeLayers(first=4, last=5), 4, 6),
        (join(2), 2, 4),
        (join(4), 4, 6),
    ],
)
def test_the_state_comes_nearer_to_the_original(
    family: str, operation: object, position: int, target: int
) -> None:
    """Behind the repaired layer, drop or merge, also at the top, before the final norm."""
    model = make_model(family)
    wanted = layer_outputs(model, TOKENS)[target]
    session = pruned(model, operation)  # type: ignore[arg-type]
    before = (layer_outputs(model, TOKENS)[position + 1] - wanted).norm()
    notes = recover("fold_linear", session).notes
    after = (layer_outputs(model, TOKENS)[position + 1] - wanted).norm()
    assert len(notes) == 1 and notes[0].startswith(f"layer {position}: ridge ")
    assert after < 0.99 * before


def test_an_endless_ridge_is_plain_removal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The stronger the ridge, the nearer the map is to the identity."""
    distances = []
    for ridge in (1e-4, 1e2, 1e12):
        monkeypatch.setattr(least_squares, "RIDGES", (ridge,))
        session = pruned(make_model(), drop(2, 3))
        plain = _down(session.model, 1).weight.detach().clone()
        recover("fold_linear", session)
        distances.append((_down(session.model, 1).weight.detach() - plain).norm().item())
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-6


def test_layers_missing_at_the_bottom_are_told() -> None:
    """Nothing stands before them, and the boundary above is repaired all the same."""
    session = pruned(make_model(), drop(0, 1, 4))
    notes = recover("fold_linear", session).notes
    assert notes[0].startswith("layers 0 to 1 are missing at the bottom")
    assert [note.split(":")[0] for note in notes[1:]] == ["layer 1"]


def test_every_token_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples have one length: no padding is fitted and no token is left out."""
    taken = []
    add = least_squares._Sums.add

    def counted(sums: object, features: torch.Tensor, *others: torch.Tensor) -> None:
        taken.append(len(features))
        add(sums, features, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(least_squares._Sums, "add", counted)
    recover("fold_linear", pruned(make_model(), drop(2)))
    assert sum(taken) == TOKENS.numel()
    assert max(taken) <= 32, "one batch at a time"


def test_only_the_layer_before_the_gap_changes() -> None:
    """Its inner activations are the same, so that the fold is exact."""
    model = make_model()
    session = pruned(model, drop(2, 3))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    inner = seen_by(model, "model.layers.1.mlp.down_proj")
    recover("fold_linear", session)
    differing = [n for n, value in model.state_dict().items() if not torch.equal(value, before[n])]
    assert differing == ["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(seen_by(model, "model.layers.1.mlp.down_proj"), inner)
