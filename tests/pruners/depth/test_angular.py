"""Angular distance on vectors whose angle is known, and the block that it chooses."""

from __future__ import annotations

import math

import pytest
import torch

from slm_plugin.errors import NumericalError
from slm_plugin.pruners.depth.angular import angular_distance, block_distances
from tests.pruners.depth.strategies import TOKENS, layer_outputs, make_identity, planned, removed
from tests.tiny import make_model


def test_known_angles() -> None:
    """Equal, scaled, orthogonal, opposite and 60 degrees apart."""
    x = torch.tensor([1.0, 2.0, -3.0])
    assert angular_distance(x, x).item() == 0
    assert angular_distance(x, -x).item() == 1
    assert angular_distance(x, 7 * x).item() == pytest.approx(0, abs=1e-15)
    axes = torch.eye(2)
    assert angular_distance(axes[0], axes[1]).item() == pytest.approx(0.5, abs=1e-15)
    sixty = torch.tensor([0.5, math.sqrt(0.75)], dtype=torch.float64)
    assert angular_distance(axes[0], sixty).item() == pytest.approx(1 / 3, abs=1e-15)


def test_rounding_makes_no_nan_and_loses_no_small_angle() -> None:
    """Equal vectors give 0 where their cosine rounds above 1; an angle of 1e-9 is not lost."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2000, 7, generator=generator)
    lengths = torch.linalg.vector_norm(x, dim=-1)
    cosines = (x * x).sum(-1) / (lengths * lengths)
    assert (cosines > 1).any() and torch.arccos(cosines).isnan().any()
    assert angular_distance(x, x).eq(0).all()
    tiny = torch.tensor([1.0, 1e-9], dtype=torch.float64)
    found = angular_distance(torch.tensor([1.0, 0.0]), tiny).item() * math.pi
    assert found == pytest.approx(1e-9, rel=1e-6)


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_the_block_is_the_arg_min_of_the_definition(family: str, layers: int) -> None:
    """Every block of a whole forward, last tokens only, the last state before the final norm."""
    model = make_model(family)
    states = [state[:, -1].double() for state in layer_outputs(model, TOKENS)]
    expected = [
        torch.nn.functional.cosine_similarity(states[i], states[i + layers], dim=-1)
        .clamp(-1, 1)
        .arccos()
        .mean()
        .item()
        / math.pi
        for i in range(6 - layers + 1)
    ]
    plan = planned("angular", model, layers)
    start = expected.index(min(expected))
    assert removed(plan) == list(range(start, start + layers))
    assert len(plan.operations) == 1
    assert plan.layer_scores is not None
    assert plan.layer_scores.scores == pytest.approx(expected, abs=1e-6)


def test_a_block_that_does_nothing_has_the_distance_zero() -> None:
    """Exactly 0, at the bottom and up to the top layer too."""
    for planted in ([0, 1], [2, 3], [4, 5]):
        model = make_model()
        make_identity(model, planted)
        plan = planned("angular", model, 2)
        assert removed(plan) == planted
        assert plan.layer_scores is not None
        assert plan.layer_scores.scores[planted[0]] == 0


def test_of_equal_blocks_the_lowest_goes() -> None:
    """Three blocks of two fit into four layers that do nothing."""
    model = make_model(num_hidden_layers=8)
    make_identity(model, [2, 3, 4, 5])
    assert removed(planned("angular", model, 2)) == [2, 3]


def test_protection_holds_for_both_ends_of_the_block() -> None:
    """A block may start at the first free layer and end at the last free one, not beyond."""
    model = make_model()
    make_identity(model, [0, 1])
    assert removed(planned("angular", model, 2)) == [0, 1]
    assert removed(planned("angular", model, 2, protect_first=1))[0] >= 1
    make_identity(model, [4, 5])
    assert removed(planned("angular", model, 2, protect_first=3)) == [4, 5]
    assert removed(planned("angular", model, 2, protect_first=3, protect_last=1)) == [3, 4]


def test_blocks_of_hand_made_states() -> None:
    """The mean over samples of the angles between states that are a block apart."""
    states = torch.tensor([[[1.0, 0], [1, 0]], [[0, 1], [1, 0]], [[1, 0], [-1, 0]]])
    assert block_distances(states, 1) == pytest.approx([0.25, 0.75])
    assert block_distances(states, 2) == pytest.approx([0.5])


def test_a_hidden_state_of_zero_is_refused() -> None:
    """It has no angle to anything."""
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[TOKENS[0, -1]] = 0
    with pytest.raises(NumericalError, match="nan"):
        planned("angular", model, 1)
