"""``config.json`` is judged before weights are looked for, and mended without being changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slm_plugin.errors import ModelSourceError, UnsupportedModelError
from slm_plugin.models.configuration import read_configuration

PLAIN: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
}
QWEN = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
GONE = object()


def written(folder: Path, **changes: Any) -> Path:
    """A config file with some fields changed or left out."""
    content = {name: value for name, value in (PLAIN | changes).items() if value is not GONE}
    (folder / "config.json").write_text(json.dumps(content), encoding="utf-8")
    return folder / "config.json"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": -32}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"hidden_size": 32.0}, "hidden_size"),
        ({"hidden_size": [32]}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": 10**30}, "hidden_size"),
        ({"hidden_size": GONE}, "lacks hidden_size"),
        ({"num_attention_heads": GONE}, "lacks num_attention_heads"),
        ({"num_hidden_layers": 0}, "num_hidden_layers"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"intermediate_size": [48] * 6}, "intermediate_size"),
        ({"num_attention_heads": 5}, "contradicts itself: num_attention_heads 5"),
        ({"num_attention_heads": 3, "num_key_value_heads": 3}, "hidden_size 32 is no multiple"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3"),
        ({"head_dim": 7}, "head_dim"),
        ({"head_dim": 0}, "head_dim"),
        ({"pad_token_id": 128}, "pad_token_id 128 and vocab_size 128"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eos_token_id": [1, None]}, "eos_token_id"),
        ({"max_position_embeddings": 0}, "max_position_embeddings"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"rms_norm_eps": None}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"rms_norm_eps": -1e-6}, "rms_norm_eps"),
        ({"attention_dropout": 1}, "attention_dropout"),
        ({"attention_bias": "false"}, "attention_bias"),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
        ({"hidden_act": "gulp"}, "hidden_act"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"dtype": "float8_e4m3fn"}, "dtype"),
        ({"dtype": "save"}, "dtype"),
        ({"dtype": "float16", "torch_dtype": "bfloat16"}, "dtype float16 and torch_dtype"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"per_layer_config": {"0": {"intermediate_size": 8}}}, "per_layer_config"),
        ({"is_encoder_decoder": True}, "is_encoder_decoder"),
        ({"to_dict": 1}, "'to_dict', which is no setting"),
        ({"__class__": "x"}, "'__class__', which is no setting"),
        ({"model_type": 3}, "model_type"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"architectures": ["LlamaForCausalLM", "MistralForCausalLM"]}, "architectures"),
        ({"model_type": "mistral"}, "LlamaForCausalLM and model_type mistral"),
        ({**QWEN, "layer_types": ["full_attention"]}, "num_hidden_layers 6 and 1 layer_types"),
        ({**QWEN, "layer_types": "full_attention"}, "layer_types"),
        ({**QWEN, "layer_types": ["mamba"] * 6}, "layer_types"),
        ({**QWEN, "layer_types": ["sliding_attention"] * 6}, "there is no window"),
        ({"rope_theta": 0}, "rope_theta"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_theta": "10000"}, "rope_theta"),
        ({"rope_scaling": []}, "rope_scaling"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": 0}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "rope_scaling.factor"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1]}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"type": "linear", "rope_type": "yarn", "factor": 2}}, "contradicts"),
        ({"rope_scaling": {**LLAMA3, "low_freq_factor": 4.0}}, "low_freq_factor"),
        ({"rope_scaling": {"type": "longrope", "short_factor": [1.0], "long_factor": [1]}}, "list"),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}}, "rope_theta 10000.0 and"),
        (
            {
                "rope_scaling": {"type": "linear", "factor": 2.0},
                "rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
            },
            "rope_parameters and another rope_scaling",
        ),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ],
)
def test_an_absurd_value_is_named(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    """The field and the file stand in one line, whatever the libraries would have made of it."""
    with pytest.raises(ModelSourceError) as caught:
        read_configuration(written(tmp_path, **changes))
    assert words in caught.value.message
    assert "config.json" in caught.value.message and "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "changes",
    [
        {"architectures": ["BloomForCausalLM"], "model_type": "bloom"},
        {"architectures": ["LlamaModel"]},
        {"architectures": ["LlamaForSequenceClassification"]},
        {"architectures": GONE, "model_type": "bloom"},
        {"architectures": None, "model_type": None},
        {"architectures": ["OddForCausalLM"], "auto_map": {"AutoConfig": "odd.OddConfig"}},
    ],
)
def test_other_classes_are_refused_by_their_config(tmp_path: Path, changes: dict[str, Any]) -> None:
    """Nothing else has to be there, neither weights nor the sizes of a decoder."""
    with pytest.raises(UnsupportedModelError, match="not supported"):
        read_configuration(written(tmp_path, **changes))


@pytest.mark.parametrize(
    "quantised",
    [
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        {"quantization_config": {"quant_method": "fp8"}},
        {"quantization_config": {"quant_method": "mxfp4"}},
        {"quantization_config": {}},
        {"quantization_config": "int4"},
        {"quantization": {"group_size": 64, "bits": 4}},
        {"compression_config": {"format": "pack-quantized"}},
    ],
)
def test_quantised_weights_are_refused_by_the_config(
    tmp_path: Path, quantised: dict[str, Any]
) -> None:
    """Whatever the method, with what to do instead."""
    with pytest.raises(ModelSourceError, match="quantised weights") as caught:
        read_configuration(written(tmp_path, **quantised))
    assert "dequantise it first" in caught.value.hint


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_theta": 5e5},
        {"rope_theta": 5e5, "rope_scaling": LLAMA3},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
        {
            "rope_theta": 5e5,
            "rope_scaling": {
                "rope_type": "longrope",
                "factor": 4.0,
                "short_factor": [1.0] * 4,
                "long_factor": [2.0] * 4,
                "original_max_position_embeddings": 64,
            },
        },
    ],
)
def test_both_spellings_of_positions_give_one_config(tmp_path: Path, rope: dict[str, Any]) -> None:
    """Transformers 4's words, 5's, and both beside one another mean the same."""
    scaling = dict(rope.get("rope_scaling") or {"rope_type": "default"})
    scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type"))
    new = {"rope_parameters": {"rope_theta": 5e5, **scaling}}
    found = [
        read_configuration(written(tmp_path, **spelt)).config.to_dict()
        for spelt in (rope, new, rope | new)
    ]
    assert found[0] == found[1] == found[2]


def test_code_and_runtime_switches_are_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fields that name code or change what a forward pass returns do not reach the library."""
    changes = {
        "auto_map": {"AutoConfig": "x.Y"},
        "custom_pipelines": {"text": {"impl": "x.Y"}},
        "return_dict": False,
        "output_hidden_states": True,
        "torchscript": True,
        "_attn_implementation_internal": "kernels-community/flash-attn",
        "experts_implementation": "kernels-community/moe",
        "temperature": 0.5,
        "unknown": [1],
    }
    found = read_configuration(written(tmp_path, **changes))
    content = found.config.to_dict()
    assert "auto_map" not in content and "custom_pipelines" not in content
    assert found.config.use_return_dict if hasattr(found.config, "use_return_dict") else True
    assert not found.config.output_hidden_states
    assert found.generation == {"temperature": 0.5}
    assert content["unknown"] == [1]
    assert found.config._attn_implementation == "sdpa"
    (line,) = capsys.readouterr().err.splitlines()
    assert "auto_map and custom_pipelines name code, which never runs" in line
    assert "LlamaForCausalLM" in line


@pytest.mark.parametrize("name", ["attn_implementation", "_attn_implementation"])
def test_attention_is_one_of_two(
    tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eager is kept; a Hub kernel or another package is replaced, and the user is told."""
    assert (
        read_configuration(written(tmp_path, **{name: "eager"})).config._attn_implementation
        == "eager"
    )
    for other in ("kernels-community/flash-attn", "flash_attention_2", ["sdpa"], {"a": "b"}):
        found = read_configuration(written(tmp_path, **{name: other}))
        assert found.config._attn_implementation == "sdpa"
    assert "sdpa is used instead" in capsys.readouterr().err


def test_the_file_stays_as_it_is(tmp_path: Path) -> None:
    """Mending happens in memory."""
    file = written(tmp_path, auto_map={}, rope_parameters={"rope_theta": 5e5}, temperature=0.1)
    before = file.read_bytes()
    read_configuration(file)
    assert file.read_bytes() == before
