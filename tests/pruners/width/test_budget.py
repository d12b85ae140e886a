"""Tests of slm_plugin.pruners.width.budget."""

from __future__ import annotations

import re
from typing import Any, Literal

import pytest

from slm_plugin.errors import TargetError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.view import DecoderView
from slm_plugin.pruners.width.budget import Cut, uniform_cut
from slm_plugin.target import Target
from tests.tiny import SMOLLM2, make_model

Groups = int | Literal["auto"]

# Llama-3-8B, by its published sizes.
LLAMA3_8B = Dimensions(
    architecture="LlamaForCausalLM",
    layers=32,
    hidden_size=4096,
    intermediate_size=14336,
    attention_heads=32,
    kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    tied_embeddings=False,
    parameters=8_030_261_248,
    layer_parameters=218_112_000,
    channel_parameters=3 * 4096,
    kv_group_parameters=5_242_880,
)


def _cut(
    target: Target, dimensions: Dimensions, kv_groups: Groups = 0, multiple_of: int = 8
) -> Cut:
    return uniform_cut(target, dimensions, dimensions, kv_groups=kv_groups, multiple_of=multiple_of)


def _removed(dimensions: Dimensions, cut: Cut) -> int:
    return dimensions.parameters - dimensions.without_units(cut.channels, cut.kv_groups).parameters


@pytest.mark.parametrize("ratio", [0.01, 0.1, 0.234, 0.4, 0.55])
@pytest.mark.parametrize("kv_groups", [0, 1, 2])
@pytest.mark.parametrize("multiple_of", [1, 8, 64])
def test_no_other_cut_comes_nearer(ratio: float, kv_groups: int, multiple_of: int) -> None:
    """Among all cuts with these KV groups and this multiple, none is nearer to the target."""
    wanted = ratio * SMOLLM2.parameters
    allowed = [
        Cut(channels, kv_groups)
        for channels in range(SMOLLM2.intermediate_size)
        if channels == 0 or (SMOLLM2.intermediate_size - channels) % multiple_of == 0
    ]
    best = min(abs(_removed(SMOLLM2, cut) - wanted) for cut in allowed)
    if best > SMOLLM2.layers * SMOLLM2.channel_parameters * multiple_of:
        with pytest.raises(TargetError, match="alone removes"):
            _cut(Target(ratio=ratio), SMOLLM2, kv_groups, multiple_of)
        return
    if best == wanted:
        with pytest.raises(TargetError, match="less than half"):
            _cut(Target(ratio=ratio), SMOLLM2, kv_groups, multiple_of)
        return
    cut = _cut(Target(ratio=ratio), SMOLLM2, kv_groups, multiple_of)
    assert cut in allowed
    assert abs(_removed(SMOLLM2, cut) - wanted) == best


@pytest.mark.parametrize(
    ("dimensions", "ratio", "groups"),
    [
        (SMOLLM2, 0.10, 0),
        (SMOLLM2, 0.30, 1),
        (SMOLLM2, 0.55, 2),
        (LLAMA3_8B, 0.10, 0),
        # A quarter of the prunable share: 2 of 8, but 24 heads do not divide 4096.
        (LLAMA3_8B, 0.25, 0),
        (LLAMA3_8B, 0.50, 4),
    ],
)
def test_auto_takes_a_share_of_kv_groups_that_loads(
    dimensions: Dimensions, ratio: float, groups: int
) -> None:
    """Auto rounds the prunable share of KV groups down to a count that transformers 5 accepts."""
    cut = _cut(Target(ratio=ratio), dimensions, "auto")
    assert cut.kv_groups == groups
    assert _removed(dimensions, cut) == pytest.approx(ratio * dimensions.parameters, rel=2e-2)


def test_auto_takes_a_share_that_is_a_whole_number() -> None:
    """Half of what can be pruned is half of the KV groups, and not the next lower count."""
    sizes = LLAMA3_8B
    mlp = sizes.intermediate_size * sizes.channel_parameters
    half = sizes.layers * (mlp + sizes.kv_heads * sizes.kv_group_parameters) // 2
    assert _cut(Target(parameters=sizes.parameters - half), sizes, "auto").kv_groups == 4


def test_auto_takes_more_groups_when_the_mlp_cannot_carry_the_rest() -> None:
    """Where the share rounds down to none and the MLP is too small, KV groups help out."""
    wide = SMOLLM2.model_copy(update={"intermediate_size": 128})
    share = 0.99 / 3 * (128 * 3 * 576 + 3 * wide.kv_group_parameters) * 30 / wide.parameters
    with pytest.raises(TargetError):
        _cut(Target(ratio=share), wide, 0)
    assert _cut(Target(ratio=share), wide, "auto").kv_groups == 1


def test_parameters_are_what_stays() -> None:
    """A parameter target counts what the model keeps, not what it loses."""
    cut = _cut(Target(parameters=121_000_000), SMOLLM2)
    left = SMOLLM2.without_units(cut.channels, cut.kv_groups).parameters
    assert left == pytest.approx(121_000_000, rel=2e-3)


def test_ratio_of_current_is_smaller_after_a_stage() -> None:
    """The same ratio of what a stage finds removes less than that of the original."""
    current = SMOLLM2.without_layers(10)
    of_original, of_current = (
        uniform_cut(Target(ratio=0.1, of=of), SMOLLM2, current, kv_groups=0, multiple_of=8)
        for of in ("original", "current")
    )
    assert _removed(current, of_original) == pytest.approx(0.1 * SMOLLM2.parameters, rel=2e-2)
    assert _removed(current, of_current) == pytest.approx(0.1 * current.parameters, rel=2e-2)


@pytest.mark.parametrize("of", ["original", "current"])
@pytest.mark.parametrize("kv_groups", [0, 1, 2, "auto"])
def test_largest_ratio_named_is_the_largest(kv_groups: Groups, of: Any) -> None:
    """The ratio in the refusal can be had, and a little more cannot."""
    current = SMOLLM2.without_layers(10)

    def cut(ratio: float) -> Cut:
        target = Target(ratio=ratio, of=of)
        return uniform_cut(target, SMOLLM2, current, kv_groups=kv_groups, multiple_of=8)

    with pytest.raises(TargetError, match="out of reach") as refused:
        cut(0.95)
    named = re.search(r"at most ratio (\d\.\d+) \(([\d,]+) parameters left\)", refused.value.hint)
    assert named is not None
    most = cut(float(named[1]))
    assert current.without_units(most.channels, most.kv_groups).parameters == int(
        named[2].replace(",", "")
    )
    with pytest.raises(TargetError):
        cut(float(named[1]) + 0.003)


def test_target_below_half_a_step_is_refused() -> None:
    """Rounding to nothing is an error that names the smallest step."""
    with pytest.raises(TargetError, match="less than half of the smallest step") as refused:
        _cut(Target(ratio=0.001), SMOLLM2, multiple_of=64)
    assert "ratio 0.024" in refused.value.hint


def test_target_above_the_present_size_is_refused() -> None:
    """A model cannot be pruned to more parameters than it has."""
    with pytest.raises(TargetError, match="removes nothing: the model has 134,515,008"):
        _cut(Target(parameters=200_000_000), SMOLLM2)


def test_all_kv_groups_cannot_go() -> None:
    """At least one KV group stays, and the message says how many may go."""
    with pytest.raises(TargetError, match="leaves no KV group") as refused:
        _cut(Target(ratio=0.3), SMOLLM2, kv_groups=3)
    assert "at most 2" in refused.value.hint


def test_kv_groups_beyond_the_target_are_refused() -> None:
    """KV groups that alone remove more than asked for are not silently accepted."""
    with pytest.raises(TargetError, match=r"kv_groups 2 alone removes ratio 0\.131"):
        _cut(Target(ratio=0.10), SMOLLM2, kv_groups=2)


def test_kv_groups_alone_may_meet_the_target() -> None:
    """Where KV groups come within half a step of the target the MLP stays whole."""
    ratio = 30 * SMOLLM2.kv_group_parameters / SMOLLM2.parameters
    assert _cut(Target(ratio=ratio - 1e-4), SMOLLM2, kv_groups=1) == Cut(0, 1)
    assert _cut(Target(ratio=ratio + 1e-4), SMOLLM2, kv_groups=1) == Cut(0, 1)


def test_multiple_beyond_the_mlp_is_refused() -> None:
    """A multiple that leaves no smaller size is named as the culprit."""
    with pytest.raises(TargetError, match="multiple_of 1536 leaves no size"):
        _cut(Target(ratio=0.1), SMOLLM2, multiple_of=1536)


def test_published_sizes_match_measured_ones() -> None:
    """The figures above follow the same arithmetic as live models."""
    tiny = DecoderView.of(make_model(num_hidden_layers=2)).dimensions()
    assert tiny.channel_parameters == 3 * tiny.hidden_size
    assert tiny.kv_group_parameters == 6 * tiny.hidden_size * tiny.head_dim
