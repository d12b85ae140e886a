"""Operators between layers: they multiply the stream, follow copies and come off for a while."""

from __future__ import annotations

import copy

import pytest
import torch

from slm_plugin.models.fingerprint import fingerprint
from slm_plugin.models.operators import operators, put_operator, without_operators
from slm_plugin.models.view import DecoderView
from tests.pruners.depth.strategies import layer_outputs
from tests.tiny import make_model, random_tokens

TOKENS = random_tokens(2, 12)


def _matrix(seed: int = 3) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.eye(32) + 0.2 * torch.randn(32, 32, generator=generator)


@torch.no_grad()
def test_the_stream_behind_a_layer_is_multiplied(family: str) -> None:
    """States are rows to the left of the matrix; layers below notice nothing."""
    model = make_model(family)
    plain = layer_outputs(model, TOKENS)
    put_operator(model.model.layers[2], _matrix())
    mapped = layer_outputs(model, TOKENS)
    for depth in range(3):
        assert torch.equal(mapped[depth], plain[depth])
    torch.testing.assert_close(mapped[3], plain[3] @ _matrix(), rtol=1e-5, atol=1e-5)
    assert list(operators(model)) == ["model.layers.2"]


@torch.no_grad()
def test_the_embedding_is_multiplied_and_a_tied_head_is_not() -> None:
    """The head reads the same weights, but no operator."""
    model = make_model(tie_word_embeddings=True)
    plain = layer_outputs(model, TOKENS)[0]
    put_operator(model.model.embed_tokens, _matrix())
    torch.testing.assert_close(
        layer_outputs(model, TOKENS)[0], plain @ _matrix(), rtol=1e-5, atol=1e-5
    )
    hidden = torch.randn(1, 3, 32)
    assert torch.equal(model.lm_head(hidden), hidden @ model.model.embed_tokens.weight.T)


@torch.no_grad()
def test_generation_is_the_same_with_and_without_a_cache(family: str) -> None:
    """An operator acts on every token alike, so the cache needs no change."""
    model = make_model(family)
    put_operator(model.model.layers[1], _matrix())
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached = model.generate(TOKENS, use_cache=True, **settings)
    assert torch.equal(cached, model.generate(TOKENS, use_cache=False, **settings))


@torch.no_grad()
def test_a_copy_has_an_operator_of_its_own() -> None:
    """What happens to one model's operator does not happen to the other's."""
    model = make_model()
    put_operator(model.model.layers[2], _matrix())
    twin = copy.deepcopy(model)
    expected = model(TOKENS).logits
    operators(model)["model.layers.2"].weight.zero_()
    assert torch.equal(twin(TOKENS).logits, expected)
    assert not torch.equal(model(TOKENS).logits, expected)


@torch.no_grad()
def test_operators_come_off_and_come_back() -> None:
    """In between the model is the stock one, in weights and in what it computes."""
    model = make_model()
    names, plain = list(model.state_dict()), model(TOKENS).logits
    put_operator(model.model.layers[2], _matrix())
    mapped = model(TOKENS).logits
    with without_operators(model):
        assert list(model.state_dict()) == names
        assert torch.equal(model(TOKENS).logits, plain)
    assert torch.equal(model(TOKENS).logits, mapped)
    assert not torch.equal(mapped, plain)


def test_dimensions_and_fingerprint_know_of_them() -> None:
    """Layers stay alike in shape; parameters and identity are those of the whole."""
    model = make_model()
    before, name = DecoderView.of(model).dimensions(), fingerprint(model)
    put_operator(model.model.layers[0], _matrix())
    after = DecoderView.of(model).dimensions()
    assert after == before.model_copy(update={"parameters": before.parameters + 32 * 32})
    assert fingerprint(model) != name


def test_a_second_operator_is_refused() -> None:
    """Two matrices at one place are one matrix."""
    model = make_model()
    put_operator(model.model.layers[0], _matrix())
    with pytest.raises(ValueError, match="already"):
        put_operator(model.model.layers[0], _matrix())
