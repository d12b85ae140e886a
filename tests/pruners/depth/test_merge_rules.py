"""Merge rules against their closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slm_plugin.models.view import projections
from slm_plugin.pruners.depth.merge_rules import check_rule, merge_weights, merged_layer
from tests.conftest import make_model


def weights(count: int, seed: int = 0) -> list[torch.Tensor]:
    """Random weights of one projection in a run of layers."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 3, generator=generator) for _ in range(count)]


@given(share=st.floats(0, 1), count=st.integers(2, 6))
def test_ema_is_its_closed_form(share: float, count: int) -> None:
    """ema(w) equals (1-w)^n low + sum of w (1-w)^(n-j) theta_j."""
    run = weights(count)
    n = count - 1
    expected = (1 - share) ** n * run[0].double()
    for j in range(1, count):
        expected += share * (1 - share) ** (n - j) * run[j].double()
    torch.testing.assert_close(
        merge_weights(f"ema({share:.17f})", run).double(), expected, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("count", [2, 3, 5])
def test_rdsc_adds_every_difference_to_the_lowest(count: int) -> None:
    """RDSC equals low + sum over k of (theta_k - low), and the top layer only for two layers."""
    run = weights(count)
    expected = run[0] + sum(weight - run[0] for weight in run[1:])
    merged = merge_weights("rdsc", run)
    torch.testing.assert_close(merged, expected)
    assert torch.allclose(merged, run[-1]) == (count == 2)


def test_telescoping_differences_are_the_top_layer() -> None:
    """The released in-place loop with w = 1 ends at the top layer; the rule returns that tensor."""
    run = weights(4)
    current = run[0].clone()
    for weight in run:
        current += weight - current
    torch.testing.assert_close(current, run[-1])
    assert merge_weights("telescoped", run) is run[-1]
    torch.testing.assert_close(merge_weights("ema(1)", run), run[-1])


def test_mean_is_the_arithmetic_mean() -> None:
    """Mean divides by the number of layers (the released ablation forgot to)."""
    run = weights(3)
    torch.testing.assert_close(merge_weights("mean", run), (run[0] + run[1] + run[2]) / 3)


def test_rules_compute_in_float32_and_keep_the_format() -> None:
    """A mean of bfloat16 weights is rounded once, at the end."""
    run = [weight.bfloat16() for weight in weights(3)]
    merged = merge_weights("mean", run)
    assert merged.dtype == torch.bfloat16
    expected = torch.stack([weight.float() for weight in run]).mean(0).bfloat16()
    assert torch.equal(merged, expected)


def test_merged_layer_mixes_top_projections_with_lowest_everything_else(family: str) -> None:
    """Projections come from the top, norms and biases from the lowest; nothing else changes."""
    model = make_model(family)
    layers = list(model.model.layers)[1:4]
    before = {name: p.clone() for name, p in model.named_parameters()}
    merged = merged_layer("telescoped", layers)
    top, low = dict(layers[-1].named_parameters()), dict(layers[0].named_parameters())
    for name, parameter in merged.named_parameters():
        source = top if name.endswith("proj.weight") else low
        assert torch.equal(parameter, source[name]), name
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert merged.self_attn.q_proj.weight is layers[-1].self_attn.q_proj.weight


def test_keep_high_and_keep_low_take_a_whole_layer(family: str) -> None:
    """keep_high carries the top layer's own norms and biases, keep_low the lowest layer's."""
    layers = list(make_model(family).model.layers)[1:4]
    for rule, source in (("keep_high", layers[-1]), ("keep_low", layers[0])):
        merged = dict(merged_layer(rule, layers).named_parameters())
        assert all(torch.equal(merged[name], p) for name, p in source.named_parameters())


def test_merged_mean_leaves_biases_of_the_lowest_layer() -> None:
    """Only projection weights are averaged; a Qwen2 bias is the lowest layer's."""
    layers = list(make_model("qwen2").model.layers)[:2]
    merged = merged_layer("mean", layers)
    assert torch.equal(merged.self_attn.q_proj.bias, layers[0].self_attn.q_proj.bias)
    for name, linear in projections(merged).items():
        expected = (projections(layers[0])[name].weight + projections(layers[1])[name].weight) / 2
        torch.testing.assert_close(linear.weight, expected)


@pytest.mark.parametrize("rule", ["average", "ema", "ema(w)", "ema(1.5)", "ema(-1)", ""])
def test_unknown_rules_are_refused(rule: str) -> None:
    """A rule that does not exist is an error that lists those which do."""
    with pytest.raises(ValueError, match="no merge rule is called"):
        check_rule(rule)
