"""The fingerprint names weights: equal bytes, equal name; one changed number, another name."""

from __future__ import annotations

import torch

from slm_plugin.models.fingerprint import fingerprint
from tests.tiny import make_model


def test_equal_weights_have_equal_fingerprints() -> None:
    """Two models built from one seed are the same model."""
    assert fingerprint(make_model(seed=3)) == fingerprint(make_model(seed=3))


def test_one_changed_number_changes_the_fingerprint() -> None:
    """The last bit of one weight counts."""
    model = make_model()
    before = fingerprint(model)
    weight = model.model.layers[2].mlp.down_proj.weight.data
    weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(torch.inf))
    assert fingerprint(model).weights != before.weights


def test_swapped_layers_change_the_fingerprint() -> None:
    """The place of a weight counts, not only its bytes."""
    model = make_model()
    before = fingerprint(model)
    layers = model.model.layers
    layers[1], layers[2] = layers[2], layers[1]
    assert fingerprint(model).weights != before.weights


def test_a_tied_head_is_the_embedding() -> None:
    """Tied weights count once: an untied copy of the same numbers is another model."""
    tied = make_model(tie_word_embeddings=True)
    untied = make_model(tie_word_embeddings=False)
    untied.load_state_dict(tied.state_dict())
    assert fingerprint(tied).weights != fingerprint(untied).weights


def test_the_number_format_is_named() -> None:
    """A model in bfloat16 is not the float32 one."""
    made = fingerprint(make_model().to(torch.bfloat16))
    assert made.dtype == "bfloat16"
    assert made.weights != fingerprint(make_model()).weights
