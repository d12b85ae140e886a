"""What would be read as another model, or would run code of a checkpoint, is refused in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.loading import ModelSource, load
from tests.tiny import make_model, make_tokenizer

RAN = "open({marker!r}, 'w').close()\nfrom transformers import PreTrainedTokenizerFast as X\n"


def checkpoint(folder: Path, family: str = "llama", **config: Any) -> Path:
    """A tiny model with some fields of its config changed behind its back."""
    make_model(family).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    change(folder / "config.json", **config)
    return folder


def change(file: Path, **fields: Any) -> None:
    """Change fields of a JSON file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


def refused(name: str | Path, words: str) -> None:
    """In both memory modes, in one line."""
    for memory in ("whole", "layerwise"):
        with pytest.raises(ModelSourceError, match=words) as caught:
            load(ModelSource(id=str(name), memory=memory, device="cpu"))
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "kind", ["AutoImageProcessor", "AutoProcessor", "AutoModelForCausalLM", "AutoTokenizer"]
)
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_class_that_is_no_tokenizer_is_refused(tmp_path: Path, kind: str, file: str) -> None:
    """Some classes of transformers load code of the folder when a tokenizer is asked for."""
    folder, marker = checkpoint(tmp_path / "m"), tmp_path / "ran"
    change(folder / file, tokenizer_class=kind, auto_map={kind: "evil.X"})
    (folder / "preprocessor_config.json").write_text(json.dumps({"auto_map": {kind: "evil.X"}}))
    (folder / "evil.py").write_text(RAN.format(marker=str(marker)))
    refused(folder, "which transformers does not have")
    assert not marker.exists()


@pytest.mark.parametrize("key", ["tokenizer_file", "vocab_file", "merges_file"])
def test_a_vocabulary_elsewhere_is_refused(tmp_path: Path, key: str) -> None:
    """Transformers 4 would read it, 5 the folder's."""
    folder = checkpoint(tmp_path / "m")
    change(folder / "tokenizer_config.json", **{key: str(tmp_path / "other.json")})
    refused(folder, "outside of the folder")


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("mistral", {"sliding_window": 8, "layer_types": ["full_attention"] * 6}, "layer_types"),
        ("llama", {"layer_types": ["sliding_attention"] * 6, "sliding_window": 8}, "no window"),
        ("llama", {"sliding_window": 8}, "no window"),
        ("qwen3", {"num_kv_shared_layers": 2}, "shares none"),
        ("llama", {"logits_scaling": 8.0}, "logits_scaling .* absent or 1"),
        ("qwen2", {"final_logit_softcapping": 30.0}, "absent: no qwen2 has it"),
        ("llama", {"no_rope_layers": [1, 1, 0, 1]}, "no_rope_layers"),
        ("mistral", {"is_causal": False}, "is_causal .* absent or true"),
        ("llama", {"text_config": {"hidden_size": 8}}, "text_config"),
        ("llama", {"hidden_act": "prelu"}, "hidden_act"),
        ("llama", {"rope_scaling": {"factor": 4.0}, "rope_parameters": None}, "rope_type"),
        (
            "llama",
            {"rope_scaling": {"full_attention": {"rope_type": "linear", "factor": 2.0}}},
            "rope_scaling",
        ),
    ],
)
def test_what_the_stock_class_would_ignore_is_refused(
    tmp_path: Path, family: str, fields: dict[str, Any], words: str
) -> None:
    """Windows, shared caches and scaling that a config states and the class does not compute."""
    refused(checkpoint(tmp_path / "m", family, **fields), words)


@pytest.mark.parametrize("name", ["~nosuch/x", "/" + "a" * 300, "a" * 5000, "b" * 300 + ".gguf"])
def test_a_name_that_no_path_can_have_is_one_line(name: str) -> None:
    """No home of that name, or too long for any disk."""
    with pytest.raises(ModelSourceError) as caught:
        load(ModelSource(id=name, device="cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["a\nb/c", "a\0b", "a\udc80"])
def test_control_characters_in_a_name_are_refused(name: str) -> None:
    """They would end a line, or a path."""
    with pytest.raises(ValueError, match=r"characters|unicode string"):
        ModelSource(id=name)


@pytest.mark.parametrize(
    "fields",
    [
        {"logits_scaling": 1.0, "rope_interleaved": False, "no_rope_layers": [1] * 6},
        {"quantization_config": None, "final_logit_softcapping": None},
        {"rms_norm_eps": 1, "initializer_range": 0},
    ],
)
def test_what_makes_no_difference_is_read(tmp_path: Path, fields: dict[str, Any]) -> None:
    """Neutral values of other families' fields, null, and whole numbers for fractions."""
    folder = checkpoint(tmp_path / "m", **fields)
    model, _ = load(ModelSource(id=str(folder), device="cpu"))
    assert model.config.num_hidden_layers == 6
