"""Sums of cosines on vectors whose answer is known."""

from __future__ import annotations

import pytest
import torch

from slm_plugin.analysis.cosines import CosineSums

# Two tokens whose vectors are compared along the hidden axis: 0.6 and -1. Along the token axis
# the cosines would be others.
STATE = torch.tensor([[[1.0, 0.0], [0.0, 2.0]]])
CHANGED = torch.tensor([[[3.0, 4.0], [0.0, -1.0]]])


def sums(*states: torch.Tensor) -> CosineSums:
    """Sums over one batch."""
    found = CosineSums(len(states), 2)
    found.add(states)
    return found


def test_cosines_are_taken_along_the_hidden_axis() -> None:
    """(0.6 - 1) / 2, not a cosine over the tokens; other tokens: (0 + 0.8) / 2 crosswise."""
    found = sums(STATE, CHANGED)
    assert found.same_token()[0, 1].item() == pytest.approx(-0.2)
    assert found.other_token()[0, 1].item() == pytest.approx(0.4)
    assert found.block_influence().tolist() == pytest.approx([1.2])


def test_influence_spans_from_nothing_to_two() -> None:
    """Unchanged, stretched token by token, and turned round."""
    turned = -STATE * torch.tensor([[[3.0], [0.2]]])
    found = sums(STATE, 5 * STATE, turned).block_influence().tolist()
    assert found == pytest.approx([0, 2]) and found[0] >= 0


def test_batches_and_chunks_do_not_change_the_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    """One batch or two, in pieces or whole."""
    states = [torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(s)) for s in range(3)]
    whole = sums(*states)
    monkeypatch.setattr("slm_plugin.analysis.cosines._CHUNK", 2)
    parts = CosineSums(3, 2)
    parts.add([state[:1] for state in states])
    parts.add([state[1:] for state in states])
    torch.testing.assert_close(parts.same_token(), whole.same_token())
    torch.testing.assert_close(parts.other_token(), whole.other_token())


def test_a_vector_of_zeros_is_like_nothing() -> None:
    """It has no direction; the cosine counts as 0 and no NaN spreads."""
    found = sums(torch.zeros(1, 2, 2), STATE).same_token()
    assert found.tolist() == [[0, 0], [0, 1]]
