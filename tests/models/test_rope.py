"""Positions: the old and the new words, alone and together."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.config_values import Where
from slm_plugin.models.families.llama import LLAMA
from slm_plugin.models.rope import Rope, rope_settings
from tests.tiny import make_model

WHERE = Where("config.json")


def test_nothing_stated_is_the_default_of_both() -> None:
    """10,000 and no scaling; null and the kind `default` state nothing either."""
    assert rope_settings({}, 8, LLAMA, WHERE) == Rope(10_000.0, None)
    assert rope_settings({"rope_theta": None, "rope_scaling": None}, 8, LLAMA, WHERE) == Rope(
        10_000.0, None
    )
    plain = {"rope_parameters": {"rope_type": "default", "rope_theta": 7}}
    assert rope_settings(plain, 8, LLAMA, WHERE) == Rope(7.0, None)


def test_the_base_may_stand_in_any_of_three_places_but_once() -> None:
    """Equal ones agree, others are refused."""
    scaling = {"type": "linear", "factor": 2.0}
    found = rope_settings({"rope_scaling": {**scaling, "rope_theta": 5}}, 8, LLAMA, WHERE)
    assert found == Rope(5.0, {"rope_type": "linear", "factor": 2.0})
    both = {"rope_theta": 5, "rope_parameters": {"rope_theta": 5.0}}
    assert rope_settings(both, 8, LLAMA, WHERE) == Rope(5.0, None)
    with pytest.raises(ModelSourceError, match="contradicts itself"):
        rope_settings({"rope_theta": 6, "rope_parameters": {"rope_theta": 5.0}}, 8, LLAMA, WHERE)


def test_longrope_needs_a_factor_for_every_pair_of_channels() -> None:
    """A list of another length would be broadcast or fail deep inside."""
    good = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4, "factor": 2}
    assert rope_settings({"rope_scaling": good}, 8, LLAMA, WHERE).scaling is not None
    with pytest.raises(ModelSourceError, match=r"long_factor.*list of 4"):
        rope_settings({"rope_scaling": {**good, "long_factor": [1.0] * 3}}, 8, LLAMA, WHERE)


LONG = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


@pytest.mark.parametrize(
    ("scaling", "beside"),
    [
        ({**LONG}, {"original_max_position_embeddings": 32}),
        ({**LONG, "original_max_position_embeddings": 32}, {}),
        (
            {**LONG, "original_max_position_embeddings": 32, "factor": 4},
            {"original_max_position_embeddings": 32},
        ),
        (
            {**LONG, "factor": 4.0, "attention_factor": 1.5},
            {"original_max_position_embeddings": 32},
        ),
    ],
)
@pytest.mark.parametrize("word", ["rope_scaling", "rope_parameters"])
def test_the_length_of_training_counts_wherever_it_stands(
    tmp_path: Path, word: str, scaling: dict[str, Any], beside: dict[str, Any]
) -> None:
    """Releases look for it in different places: 32 of 128 positions, with any of them."""
    from slm_plugin.models.configuration import read_configuration

    config = make_model("llama", max_position_embeddings=128).config.to_dict()
    for name in ("rope_scaling", "rope_parameters"):
        config.pop(name, None)
    head = config["hidden_size"] // config["num_attention_heads"]
    lists = {k: v[:1] * (head // 2) for k, v in scaling.items() if isinstance(v, list)}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**config, **beside, word: {**scaling, **lists}}))
    read = read_configuration(file).config
    rotary = LlamaRotaryEmbedding(read)
    wanted = scaling.get("attention_factor", math.sqrt(1 + math.log(4) / math.log(32)))
    states = torch.zeros(1, 1, 1)
    for length, slower in ((32, 1.0), (33, 4.0)):
        cosine, _ = rotary(states, torch.arange(length)[None])
        angle = (length - 1) / slower  # The first pair of channels turns by one a position.
        assert float(cosine[0, -1, 0]) == pytest.approx(wanted * math.cos(angle), abs=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rope_scaling": LONG}, "must be given for rope_type longrope"),
        (
            {"rope_scaling": {**LONG, "factor": 2.0}, "original_max_position_embeddings": 32},
            "factor 2.0, and max_position_embeddings 128",
        ),
        (
            {
                "rope_scaling": {**LONG, "original_max_position_embeddings": 64},
                "original_max_position_embeddings": 32,
            },
            "contradicts itself",
        ),
        (
            {
                "rope_scaling": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "original_max_position_embeddings": 64,
                },
                "original_max_position_embeddings": 32,
            },
            "contradicts itself",
        ),
        ({"rope_scaling": LONG, "original_max_position_embeddings": 0}, "whole number from 1"),
    ],
)
def test_what_two_releases_read_as_two_scales_is_refused(
    fields: dict[str, Any], words: str
) -> None:
    """One lets the ratio of lengths win over the factor, the other the factor."""
    with pytest.raises(ModelSourceError, match=words):
        rope_settings({"max_position_embeddings": 128, **fields}, 8, LLAMA, WHERE)


def test_the_length_of_training_beside_yarn_moves_into_it() -> None:
    """Transformers 4 would not look at it there, 5 would."""
    yarn = {"rope_type": "yarn", "factor": 4.0}
    found = rope_settings(
        {"rope_scaling": yarn, "original_max_position_embeddings": 32}, 8, LLAMA, WHERE
    )
    assert found.scaling == {**yarn, "original_max_position_embeddings": 32}


def test_what_5_fills_in_for_longrope_states_nothing() -> None:
    """The longest text as length of training, where none was given."""
    config = {
        "max_position_embeddings": 128,
        "rope_parameters": {**LONG, "factor": 4.0, "original_max_position_embeddings": 128},
    }
    scaling = rope_settings(config, 8, LLAMA, WHERE).scaling
    assert scaling is not None and "original_max_position_embeddings" not in scaling
