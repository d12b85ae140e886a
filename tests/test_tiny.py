"""Tiny models compute what transformers computes."""

from __future__ import annotations

import itertools

import pytest
import torch
from transformers import masking_utils as masks

from tests.tiny import broadcast_mask

PADDING = torch.ones(2, 9).bool()
PADDING[1, :4] = False
PARTS = torch.tensor([[0] * 4 + [1] * 5, [0] * 9])
RULES = {
    "causal": masks.causal_mask_function,
    "window": masks.sliding_window_causal_mask_function(3),
    "chunks": masks.chunked_causal_mask_function(4, torch.tensor([0, 2])),
    "padding": masks.and_masks(masks.causal_mask_function, masks.padding_mask_function(PADDING)),
    "packed": masks.packed_sequence_mask_function(PARTS),
    "either": masks.or_masks(
        masks.causal_mask_function, masks.packed_sequence_mask_function(PARTS)
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_a_mask_is_its_rule_at_every_entry(name: str) -> None:
    """Asked entry by entry, for queries behind a cache."""
    axes = torch.arange(2), torch.arange(1), torch.arange(2, 7), torch.arange(9)
    found = broadcast_mask(RULES[name])(*axes)
    entries = [bool(RULES[name](*at)) for at in itertools.product(*axes)]
    assert found.shape == (2, 1, 5, 9) and found.flatten().tolist() == entries
    assert 0 < sum(entries) < len(entries)
