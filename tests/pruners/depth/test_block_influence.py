"""ShortGPT's choice against the definition of block influence."""

from __future__ import annotations

import pytest
import torch

from slm_plugin.pruners.depth.measures.criteria import token_cosine
from tests.conftest import make_model
from tests.pruners.depth.strategies import TOKENS, gone, layer_outputs, planned


def test_the_layers_of_least_influence_go(family: str) -> None:
    """Order and scores are those of the cosine per token, written out over a whole forward."""
    model = make_model(family, num_hidden_layers=8)
    states = layer_outputs(model, TOKENS)
    expected = [
        1 - torch.nn.functional.cosine_similarity(states[i], states[i + 1], dim=-1).mean().item()
        for i in range(8)
    ]
    plan = planned("block_influence", model, 4)
    assert gone(plan) == sorted(range(8), key=lambda i: expected[i])[:4]
    assert plan.layer_scores is not None
    assert plan.layer_scores.scores == pytest.approx(expected, abs=1e-6)


def test_the_cosine_runs_along_the_features() -> None:
    """Where the cosine per token and that per channel differ, the answer is the one per token."""
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]]])
    y = torch.tensor([[[2.0, 0.0], [0.0, 3.0], [0.0, 1.0]]])
    per_channel = torch.nn.functional.cosine_similarity(x, y, dim=1).mean().item()
    assert token_cosine(x, y).item() == pytest.approx(2 / 3)
    assert per_channel != pytest.approx(2 / 3, abs=0.05)
    assert token_cosine(x, -x).item() == pytest.approx(-1)
