"""Tests of slm_plugin.export.portable_json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoConfig, AutoTokenizer

from slm_plugin.export.checkpoint import save_checkpoint
from slm_plugin.export.portable_json import mend_config, mend_tokenizer_config
from slm_plugin.session import Session
from tests.tiny import make_model, make_tokenizer

FIVE = int(transformers.__version__.split(".")[0]) >= 5
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def mended(folder: Path, name: str, content: dict[str, Any]) -> dict[str, Any]:
    """What a config file holds after mending."""
    (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (mend_config if name == "config.json" else mend_tokenizer_config)(folder)
    result: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return result


def rope_settings(theta: float, scaling: dict[str, Any]) -> dict[str, Any]:
    """Config arguments for a rotary embedding in the words of the installed transformers."""
    if FIVE:
        return {"rope_parameters": {"rope_theta": theta, **scaling}}
    return {"rope_theta": theta, "rope_scaling": scaling}


def test_rope_theta_stands_beside_rope_parameters(tmp_path: Path) -> None:
    """Transformers 4.57 reads rope_theta, and 10,000 where there is none."""
    rope = {"rope_theta": 500000.0, "rope_type": "default"}
    found = mended(tmp_path, "config.json", {"rope_parameters": rope})
    assert found == {"rope_parameters": rope, "rope_theta": 500000.0}


def test_scaled_rope_stands_beside_rope_parameters(tmp_path: Path) -> None:
    """Transformers 4.57 reads the scaling from rope_scaling."""
    rope = {"rope_theta": 500000.0, **LLAMA3}
    found = mended(tmp_path, "config.json", {"rope_parameters": rope})
    assert found["rope_scaling"] == LLAMA3
    assert found["rope_theta"] == 500000.0


def test_the_number_of_experts_stands_under_both_names(tmp_path: Path) -> None:
    """Transformers 4.57 reads num_experts alone, 5 writes num_local_experts alone."""
    session = Session(make_model("qwen3_moe", num_hidden_layers=2, num_experts=3))
    save_checkpoint(session, tmp_path)
    found = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert found["num_experts"] == found["num_local_experts"] == 3
    assert AutoConfig.from_pretrained(tmp_path).num_experts == 3


def test_a_config_of_transformers_4_stays_as_it_is(tmp_path: Path) -> None:
    """Nothing is added to what 4.57 wrote."""
    config = {"rope_theta": 10000.0, "rope_scaling": None, "vocab_size": 3}
    assert mended(tmp_path, "config.json", config) == config


def test_traces_of_the_source_file_are_dropped(tmp_path: Path) -> None:
    """Neither a path nor the title of a GGUF file belongs to the model."""
    config = {"_name_or_path": "/home/me/x", "_model_name_or_path": "Mix 1", "vocab_size": 3}
    assert mended(tmp_path, "config.json", config) == {"vocab_size": 3}


def test_the_tokenizer_class_is_one_that_both_know(tmp_path: Path) -> None:
    """Transformers 4.57 refuses TokenizersBackend and a list of extra special tokens."""
    found = mended(
        tmp_path,
        "tokenizer_config.json",
        {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<a>"]},
    )
    assert found == {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<a>"],
    }


def test_another_tokenizer_class_stays(tmp_path: Path) -> None:
    """A class of its own means something, and named special tokens are a mapping in both."""
    config = {"tokenizer_class": "Qwen2Tokenizer", "extra_special_tokens": {"image": "<i>"}}
    assert mended(tmp_path, "tokenizer_config.json", config) == config


def test_saved_settings_read_back_and_carry_the_old_names(tmp_path: Path) -> None:
    """A scaled rotary embedding is written in both forms and the installed release reads it."""
    model = make_model(max_position_embeddings=512, **rope_settings(500000.0, LLAMA3))
    save_checkpoint(Session(model), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["rope_theta"] == 500000.0
    assert written["rope_scaling"] == LLAMA3
    found = AutoConfig.from_pretrained(tmp_path)
    name = "rope_parameters" if FIVE else "rope_scaling"
    assert getattr(found, name) == getattr(model.config, name)


def test_a_saved_tokenizer_keeps_special_tokens_and_chat_template(tmp_path: Path) -> None:
    """What the mended files say is what AutoTokenizer loads."""
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["w9", "w11"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    save_checkpoint(Session(make_model(), tokenizer), tmp_path)
    found = AutoTokenizer.from_pretrained(tmp_path)
    assert found.chat_template == tokenizer.chat_template
    assert found.all_special_tokens == tokenizer.all_special_tokens
    assert found("w5 w9 w7")["input_ids"] == [5, 9, 7]
