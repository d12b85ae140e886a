"""Merge rules against their closed forms."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from slm_plugin.errors import PlanError
from slm_plugin.models.families.llama import LLAMA
from slm_plugin.models.view import projections
from slm_plugin.plans.rules import check_rule
from slm_plugin.surgery.merge_rules import candidates, merge_weights, merged_layer
from tests.tiny import make_model


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


@pytest.mark.parametrize("weights_only", [True, False])
def test_telescoped_is_the_top_layer_between_the_lowest_norms(
    family: str, weights_only: bool
) -> None:
    """Projections are the top's, norm gains the lowest's; biases and q/k norms follow by choice."""
    model = make_model(family)
    layers = list(model.model.layers)[1:4]
    before = {name: p.clone() for name, p in model.named_parameters()}
    merged = merged_layer("telescoped", layers, LLAMA, weights_only=weights_only)
    top, low = dict(layers[-1].named_parameters()), dict(layers[0].named_parameters())
    for name, parameter in merged.named_parameters():
        follows = name.endswith("proj.weight") or (not weights_only and "layernorm" not in name)
        assert torch.equal(parameter, (top if follows else low)[name]), name
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert merged.self_attn.q_proj.weight is layers[-1].self_attn.q_proj.weight


def test_keep_high_and_keep_low_take_a_whole_layer(family: str) -> None:
    """keep_high carries the top layer's own norms and biases, keep_low the lowest layer's."""
    layers = list(make_model(family).model.layers)[1:4]
    for rule, source in (("keep_high", layers[-1]), ("keep_low", layers[0])):
        merged = dict(merged_layer(rule, layers, LLAMA).named_parameters())
        assert all(torch.equal(merged[name], p) for name, p in source.named_parameters())


def test_a_mean_takes_biases_along() -> None:
    """A projection and its bias are averaged together, unless only weights are asked for."""
    layers = list(make_model("qwen2").model.layers)[:2]
    both = [projections(layer, LLAMA) for layer in layers]
    for weights_only in (True, False):
        merged = projections(merged_layer("mean", layers, LLAMA, weights_only=weights_only), LLAMA)
        for name, linear in merged.items():
            expected = (both[0][name].weight + both[1][name].weight) / 2
            torch.testing.assert_close(linear.weight, expected)
        bias = both[0]["q_proj"].bias
        if not weights_only:
            bias = (bias + both[1]["q_proj"].bias) / 2
        torch.testing.assert_close(merged["q_proj"].bias, bias)


def test_activation_weighs_layers_by_what_they_change() -> None:
    """The rule that a plan holds names the shares, which add up to one."""
    influence = [9.0, 1.0, 2.0, 1.0, 9.0]
    (rule,) = candidates("activation", 1, 3, lambda: influence)
    assert rule == "weighted(0.250000,0.500000,0.250000)"
    run = weights(3)
    torch.testing.assert_close(
        merge_weights(rule, run), 0.25 * run[0] + 0.5 * run[1] + 0.25 * run[2]
    )


def test_a_weighted_rule_for_another_run_is_refused() -> None:
    """Three shares do not merge two layers, and a rule in an edited plan must exist."""
    with pytest.raises(PlanError, match="for 3 layers, not 2"):
        merge_weights("weighted(0.2,0.3,0.5)", weights(2))
    with pytest.raises(PlanError, match="no merge rule is called 'activation'"):
        merge_weights("activation", weights(2))


def test_best_offers_every_rule_without_a_number() -> None:
    """Each candidate is a rule that surgery carries out without data."""
    found = list(candidates("best", 0, 1, lambda: [1.0, 3.0]))
    assert found[-1] == "weighted(0.250000,0.750000)"
    for rule in found:
        assert merge_weights(rule, weights(2)).shape == (5, 3)
    assert len(set(found)) == 6


@pytest.mark.parametrize("rule", ["average", "ema", "ema(w)", "ema(1.5)", "ema(-1)", ""])
def test_unknown_rules_are_refused(rule: str) -> None:
    """A rule that does not exist is an error that lists those which do."""
    with pytest.raises(ValueError, match="no merge rule is called"):
        check_rule(rule)


def test_weights_may_be_negative_but_add_up_to_something() -> None:
    """The written form of an RDSC within an RDSC is a sum like any other."""
    run = weights(4)
    merged = merge_weights("weighted(-1,-1,2,1)", run)
    torch.testing.assert_close(merged, -run[0] - run[1] + 2 * run[2] + run[3])
    with pytest.raises(PlanError, match="add up to 0"):
        merge_weights("weighted(1,-1)", run[:2])
    with pytest.raises(PlanError, match="no merge rule"):
        merge_weights("weighted(--1,1)", run[:2])
