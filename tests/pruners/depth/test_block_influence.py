"""ShortGPT's choice against the definition of block influence."""

from __future__ import annotations

import pytest
import torch

from slm_plugin.errors import NumericalError
from slm_plugin.pruners.depth.measures.criteria import token_cosine
from tests.pruners.depth.strategies import TOKENS, layer_outputs, make_identity, planned, removed
from tests.tiny import make_model


def test_the_layers_of_least_influence_go(family: str) -> None:
    """Order and scores are those of the cosine per token, written out over a whole forward."""
    model = make_model(family, num_hidden_layers=8)
    # The last batch has one sample, the others two.
    tokens = TOKENS[:5]
    states = layer_outputs(model, tokens)
    expected = [
        1 - torch.nn.functional.cosine_similarity(states[i], states[i + 1], dim=-1).mean().item()
        for i in range(8)
    ]
    plan = planned("block_influence", model, 4, tokens=tokens)
    assert removed(plan) == sorted(range(8), key=lambda i: expected[i])[:4]
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


def test_influence_is_nothing_for_an_idle_layer_and_two_for_one_that_turns_round() -> None:
    """Exactly 0 up to rounding; a layer that takes away twice its input leaves minus the input."""
    model = make_model()
    make_identity(model, [2, 5])
    plan = planned("block_influence", model, 2)
    assert plan.layer_scores is not None
    assert [plan.layer_scores.scores[i] for i in (2, 5)] == pytest.approx([0, 0], abs=1e-12)
    turning = make_model(mlp_bias=True)
    make_identity(turning, [3])
    with torch.no_grad():
        # Where every token has the same state, a bias can take away twice of it.
        turning.model.embed_tokens.weight.copy_(turning.model.embed_tokens.weight[5].clone())
        state = layer_outputs(turning, TOKENS)[3][0, 0]
        turning.model.layers[3].mlp.down_proj.bias.copy_(-2 * state)
    plan = planned("block_influence", turning, 1)
    assert plan.layer_scores is not None
    assert plan.layer_scores.scores[3] == pytest.approx(2, abs=1e-9)


@pytest.mark.parametrize("name", ["block_influence", "streamline", "merge_concat"])
def test_a_hidden_state_of_zero_is_refused(name: str) -> None:
    """It has no cosine to anything, also where it is not the last token's."""
    model = make_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[TOKENS[0, 0]] = 0
    assert TOKENS[0, 0] not in TOKENS[:, -1]
    with pytest.raises(NumericalError, match="block influence of"):
        planned(name, model, 1, tokens=TOKENS)
