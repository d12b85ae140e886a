"""The view measures what is there, and dimensions predict what removal leaves."""

from __future__ import annotations

import pytest
from transformers import BloomConfig, BloomForCausalLM

from slm_plugin.errors import UnsupportedModelError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.families.llama import LLAMA
from slm_plugin.models.view import DecoderView, projections
from tests.tiny import make_model

FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_dimensions_count_every_scalar(family: str, tied: bool) -> None:
    """Embedding, layers, final norm and an untied head add up to the model."""
    model = make_model(family, tie_word_embeddings=tied)
    found = DecoderView.of(model).dimensions()
    outside = found.vocab_size * found.hidden_size * (1 if tied else 2) + found.hidden_size
    assert found.layers * found.layer_parameters + outside == found.parameters
    assert found.tied_embeddings == tied


@pytest.mark.parametrize("family", FAMILIES)
def test_predicted_dimensions_are_those_of_a_smaller_model(family: str) -> None:
    """Fewer layers, channels and groups: the prediction is what such a model measures."""
    predicted = DecoderView.of(make_model(family)).dimensions()
    predicted = predicted.without_layers(2).without_units(channels=8, kv_groups=1)
    smaller = make_model(
        family,
        num_hidden_layers=4,
        intermediate_size=40,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    assert DecoderView.of(smaller).dimensions() == predicted


def test_layers_of_unlike_shape_are_refused() -> None:
    """Layers may differ in their MLP channels, as allocations leave them, and in nothing else."""
    model = make_model()
    model.model.layers[3] = make_model(intermediate_size=56).model.layers[3]
    assert DecoderView.of(model).dimensions().widths == (48, 48, 48, 56, 48, 48)
    model.model.layers[3] = make_model(num_key_value_heads=4).model.layers[3]
    with pytest.raises(UnsupportedModelError, match="layer 3 differs"):
        DecoderView.of(model).dimensions()


def test_other_architectures_are_refused_with_the_supported_ones() -> None:
    """The message names what would work."""
    model = BloomForCausalLM(BloomConfig(n_layer=1, hidden_size=8, n_head=2, vocab_size=16))
    with pytest.raises(UnsupportedModelError, match="BloomForCausalLM") as caught:
        DecoderView.of(model)
    assert "LlamaForCausalLM" in str(caught.value.hint)


def test_seven_projections_are_found() -> None:
    """In the order of computation."""
    names = list(projections(make_model().model.layers[0], LLAMA))
    assert names == ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def test_dimensions_know_their_sharing() -> None:
    """Query heads per KV head."""
    found: Dimensions = DecoderView.of(make_model()).dimensions()
    assert found.queries_per_group == 2
