"""Tests of slm_plugin.pruners.width.importance."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from slm_plugin.errors import NumericalError
from slm_plugin.models.families.llama import LLAMA
from slm_plugin.models.view import DecoderView, projections
from slm_plugin.plans import UnitScores
from slm_plugin.pruners.width.importance import kept_units, magnitude, taylor
from tests.tiny import make_model, random_tokens

HEAD_DIM = 8


def _scores(found: tuple[UnitScores, ...], layer: int, unit: str) -> list[float]:
    (one,) = [s for s in found if s.layer == layer and s.unit == unit]
    return list(one.scores)


def _brute_force(
    saliences: dict[str, torch.Tensor], kv_heads: int, queries: int
) -> tuple[list[float], list[float]]:
    """Channel and KV group scores, one scalar product of indices at a time."""
    channels = [
        sum(
            float(part.double().sum())
            for part in (
                saliences["gate_proj"][j],
                saliences["up_proj"][j],
                saliences["down_proj"][:, j],
            )
        )
        for j in range(saliences["gate_proj"].shape[0])
    ]
    groups = [0.0] * kv_heads
    for head in range(kv_heads * queries):
        for i in range(head * HEAD_DIM, (head + 1) * HEAD_DIM):
            groups[head // queries] += float(saliences["q_proj"][i].double().sum())
            groups[head // queries] += float(saliences["o_proj"][:, i].double().sum())
    for head in range(kv_heads):
        for i in range(head * HEAD_DIM, (head + 1) * HEAD_DIM):
            groups[head] += float(saliences["k_proj"][i].double().sum())
            groups[head] += float(saliences["v_proj"][i].double().sum())
    return channels, groups


def _taylor(model: PreTrainedModel) -> tuple[UnitScores, ...]:
    return taylor(DecoderView.of(model), random_tokens().split(3))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_magnitude_sums_the_coupled_weights(family: str, kv_heads: int) -> None:
    """Magnitude equals the written-out sum of w**2 over each unit's rows and columns."""
    model = make_model(family, num_hidden_layers=2, num_key_value_heads=kv_heads)
    found = magnitude(DecoderView.of(model))
    for index, layer in enumerate(model.model.layers):
        weights = {n: m.weight.detach() ** 2 for n, m in projections(layer, LLAMA).items()}
        channels, groups = _brute_force(weights, kv_heads, 4 // kv_heads)
        assert _scores(found, index, "mlp_channel") == pytest.approx(channels, rel=6e-6)
        assert _scores(found, index, "kv_group") == pytest.approx(groups, rel=6e-6)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_taylor_sums_weight_times_gradient(family: str, kv_heads: int) -> None:
    """Taylor equals the written-out sum of |w * dL/dw| with the gradient of one whole batch."""
    model = make_model(family, num_hidden_layers=2, num_key_value_heads=kv_heads)
    found = _taylor(model)
    tokens = random_tokens()
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    for index, layer in enumerate(model.model.layers):
        saliences = {
            n: (m.weight.detach() * m.weight.grad).abs()
            for n, m in projections(layer, LLAMA).items()
        }
        channels, groups = _brute_force(saliences, kv_heads, 4 // kv_heads)
        assert _scores(found, index, "mlp_channel") == pytest.approx(channels, rel=1e-4)
        assert _scores(found, index, "kv_group") == pytest.approx(groups, rel=1e-4)


def test_dead_neuron_scores_zero_by_taylor() -> None:
    """A channel whose up row is zero cannot matter: score 0, first to go."""
    model = make_model(num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[17] = 0
    scores = _scores(_taylor(model), 1, "mlp_channel")
    assert scores[17] == 0
    assert set(range(48)) - set(kept_units(scores, 1)) == {17}


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_dead_kv_group_scores_zero_by_taylor(family: str, kv_heads: int) -> None:
    """A KV group whose output nobody reads scores 0, whichever query heads belong to it."""
    model = make_model(family, num_hidden_layers=2, num_key_value_heads=kv_heads)
    width = 32 // kv_heads
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight[:, width : 2 * width] = 0
    scores = _scores(_taylor(model), 0, "kv_group")
    assert scores[1] == 0
    assert all(score > 0 for index, score in enumerate(scores) if index != 1)


def test_dead_units_go_first_by_magnitude() -> None:
    """Zeroed weights of a channel and of a KV group give the lowest scores."""
    model = make_model(num_hidden_layers=2)
    layer = model.model.layers[0]
    with torch.no_grad():
        for linear in (layer.mlp.gate_proj, layer.mlp.up_proj):
            linear.weight[5] = 0
        layer.mlp.down_proj.weight[:, 5] = 0
        for linear, rows in ((layer.self_attn.q_proj, 16), (layer.self_attn.k_proj, 8)):
            linear.weight[rows:] = 0
        layer.self_attn.v_proj.weight[8:] = 0
        layer.self_attn.o_proj.weight[:, 16:] = 0
    found = magnitude(DecoderView.of(model))
    assert _scores(found, 0, "mlp_channel")[5] == 0
    assert _scores(found, 0, "kv_group")[1] == 0
    assert _scores(found, 0, "kv_group")[0] > 0


def test_permuting_channels_permutes_scores() -> None:
    """The same function with its channels in another order has its scores in that order."""
    model = make_model(num_hidden_layers=2)
    before = _scores(_taylor(model), 0, "mlp_channel")
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    mlp = model.model.layers[0].mlp
    with torch.no_grad():
        mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[order])
        mlp.up_proj.weight.copy_(mlp.up_proj.weight[order])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
    after = _scores(_taylor(model), 0, "mlp_channel")
    assert after == pytest.approx([before[i] for i in order.tolist()], rel=1e-3)


def test_permuting_kv_groups_permutes_scores() -> None:
    """KV groups that change places with their query heads take their scores along."""
    model = make_model(num_hidden_layers=2)
    before = _scores(_taylor(model), 0, "kv_group")
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        for linear, half in (
            (attention.q_proj, 16),
            (attention.k_proj, 8),
            (attention.v_proj, 8),
        ):
            linear.weight.copy_(linear.weight.roll(half, 0))
        attention.o_proj.weight.copy_(attention.o_proj.weight.roll(16, 1))
    after = _scores(_taylor(model), 0, "kv_group")
    assert after == pytest.approx(before[::-1], rel=1e-3)


def test_half_precision_magnitudes_do_not_overflow() -> None:
    """Squares beyond float16's range are summed in float32."""
    model = make_model(num_hidden_layers=2).half()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(300)
    scores = _scores(magnitude(DecoderView.of(model)), 0, "mlp_channel")
    assert min(scores) >= 32 * 300**2


def test_scores_that_are_not_numbers_are_refused() -> None:
    """NaN in a weight is an error that names the layer, not a low score."""
    model = make_model(num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="layer 1"):
        magnitude(DecoderView.of(model))


def test_scores_have_six_significant_digits() -> None:
    """What a plan holds is short and reads back as the same number."""
    scores = [s for one in _taylor(make_model(num_hidden_layers=2)) for s in one.scores]
    assert all(float(f"{score:.5e}") == score for score in scores)
    assert any(float(f"{score:.4e}") != score for score in scores)


def test_lowest_scores_go_and_ties_go_from_the_front() -> None:
    """Among equal scores the lowest index goes first; what stays is in order."""
    assert kept_units([3.0, 1.0, 2.0, 1.0, 1.0], 2) == (0, 2, 4)
    assert kept_units([0.0] * 4, 3) == (3,)
    assert kept_units([2.0, 1.0], 0) == (0, 1)
