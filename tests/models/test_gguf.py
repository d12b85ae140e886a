"""A GGUF file becomes the model that it describes, or is refused by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from slm_plugin.errors import ModelSourceError, UnsupportedModelError
from slm_plugin.models.gguf import is_gguf, read_gguf
from slm_plugin.models.loading import ModelSource, load
from tests.models.gguf_files import (
    VOCABULARY,
    make_gguf_model,
    network_fields,
    network_tensors,
    without,
    write_gguf,
    write_raw,
)


def ids(length: int = 24) -> torch.Tensor:
    """Token ids, ``(2, length)``."""
    return torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(1))


def assert_equal(model: PreTrainedModel, original: PreTrainedModel) -> None:
    """Same parameters and same logits, to the last bit."""
    wanted = dict(original.named_parameters())
    found = dict(model.named_parameters())
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    with torch.inference_mode():
        assert torch.equal(model(ids()).logits, original(ids()).logits)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize("tied", [False, True])
def test_a_file_becomes_the_model_it_was_written_from(
    family: str, tied: bool, tmp_path: Path
) -> None:
    """Every architecture, with a head of its own or the embedding's, to the last bit."""
    original = make_gguf_model(family, tie_word_embeddings=tied)
    model, tokenizer = read_gguf(write_gguf(tmp_path / "m.gguf", original, family))
    assert_equal(model, original)
    assert model.config.tie_word_embeddings is tied
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) is tied
    assert tokenizer is not None


@pytest.mark.parametrize("biases", [{"attention_bias": True}, {"mlp_bias": True}])
def test_biases_of_a_llama_are_read(biases: dict[str, bool], tmp_path: Path) -> None:
    """Attention and MLP biases come through, the former in the order of their rows."""
    original = make_gguf_model(**biases)
    assert_equal(read_gguf(write_gguf(tmp_path / "m.gguf", original))[0], original)


def test_a_head_width_of_its_own_is_read(tmp_path: Path) -> None:
    """Heads may be wider than their share of the residual stream."""
    original = make_gguf_model(head_dim=16)
    assert_equal(read_gguf(write_gguf(tmp_path / "m.gguf", original))[0], original)


@pytest.mark.parametrize(
    "scaling",
    [
        {"rope_type": "linear", "factor": 4.0},
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        {
            "rope_type": "yarn",
            "factor": 8.0,
            "original_max_position_embeddings": 32,
            "beta_fast": 16.0,
            "beta_slow": 2.0,
        },
    ],
)
def test_rope_scaling_is_read(scaling: dict[str, Any], tmp_path: Path) -> None:
    """The model turns queries and keys as the original does, in both lines of transformers."""
    original = make_gguf_model(rope_scaling=dict(scaling))
    names = {
        "rope_type": "rope.scaling.type",
        "factor": "rope.scaling.factor",
        "original_max_position_embeddings": "rope.scaling.original_context_length",
        "beta_fast": "rope.scaling.yarn_beta_fast",
        "beta_slow": "rope.scaling.yarn_beta_slow",
    }
    fields = {f"llama.{names[key]}": value for key, value in scaling.items()}
    assert_equal(read_gguf(write_gguf(tmp_path / "m.gguf", original, fields=fields))[0], original)


def test_the_old_key_of_linear_scaling_is_read(tmp_path: Path) -> None:
    """Older converters wrote rope.scale_linear; a factor without a type is linear too."""
    original = make_gguf_model(rope_scaling={"rope_type": "linear", "factor": 2.0})
    for key in ("rope.scale_linear", "rope.scaling.factor"):
        path = write_gguf(tmp_path / f"{key}.gguf", original, fields={f"llama.{key}": 2.0})
        assert_equal(read_gguf(path)[0], original)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def rope_freqs(model: PreTrainedModel) -> Any:
    """What the model divides its frequencies by, as converters store it."""
    plain = 10_000.0 ** -(torch.arange(0, model.config.head_dim, 2) / model.config.head_dim)
    return (plain / model.model.rotary_emb.inv_freq).numpy().astype(np.float32)


@pytest.mark.parametrize("head_dim", [8, 16, 32])
@pytest.mark.parametrize(
    "changed",
    [
        {"original_max_position_embeddings": 64},
        {"original_max_position_embeddings": 8192, "factor": 32.0},
        {"original_max_position_embeddings": 100},
        {"original_max_position_embeddings": 1500, "factor": 3.5},
    ],
)
def test_llama_3_frequencies_are_recovered(
    changed: dict[str, float], head_dim: int, tmp_path: Path
) -> None:
    """rope_freqs.weight gives the parameters that it was made of, or others that do the same."""
    scaling = {**LLAMA3, **changed}
    original = make_gguf_model(rope_scaling=scaling, head_dim=head_dim)
    tensors = {"rope_freqs.weight": rope_freqs(original)}
    model, _ = read_gguf(write_gguf(tmp_path / "m.gguf", original, tensors=tensors))
    turned = model.model.rotary_emb.inv_freq / original.model.rotary_emb.inv_freq
    assert float((turned - 1).abs().max()) < 1e-5


def test_llama_3_frequencies_with_another_upper_bound_are_recovered(tmp_path: Path) -> None:
    """high_freq_factor is found from the interpolated frequencies when it is not 4."""
    scaling = {**LLAMA3, "original_max_position_embeddings": 512, "high_freq_factor": 16.0}
    original = make_gguf_model(rope_scaling=scaling, head_dim=32)
    tensors = {"rope_freqs.weight": rope_freqs(original)}
    model, _ = read_gguf(write_gguf(tmp_path / "m.gguf", original, tensors=tensors))
    turned = model.model.rotary_emb.inv_freq / original.model.rotary_emb.inv_freq
    assert float((turned - 1).abs().max()) < 1e-5


@pytest.mark.parametrize(
    "factors", [[1, 2, 1, 8], [1, 0.5, 1, 1], [1, 1, 1, 0], [1, 1, 1, float("nan")], [1, 8]]
)
def test_other_frequencies_are_refused(factors: list[float], tmp_path: Path) -> None:
    """Factors that no scaling of transformers gives, as of long RoPE, are refused."""
    tensors = {"rope_freqs.weight": np.array(factors, np.float32)}
    with pytest.raises(ModelSourceError, match=r"rope_freqs\.weight"):
        read_gguf(write_gguf(tmp_path / "m.gguf", tensors=tensors))


def test_frequencies_of_ones_scale_nothing(tmp_path: Path) -> None:
    """A converter that writes the tensor for every model is obeyed."""
    original = make_gguf_model()
    tensors = {"rope_freqs.weight": np.ones(4, np.float32)}
    path = write_gguf(tmp_path / "m.gguf", original, tensors=tensors)
    assert_equal(read_gguf(path)[0], original)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_count", 8),
        ("expert_used_count", 2),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", 30.0),
        ("attention.sliding_window", 64),
        ("attention.scale", 0.5),
        ("attention.causal", False),
        ("attention.clamp_kqv", 8.0),
        ("attention.max_alibi_bias", 8.0),
        ("attention.value_length", 16),
        ("attention.key_length", 6),
        ("attention.head_count", [4, 4, 2]),
        ("attention.head_count_kv", 3),
        ("attention.head_count_kv", 0),
        ("feed_forward_length", [48, 48, 32]),
        ("feed_forward_length", 1 << 30),
        ("rope.dimension_count", 4),
        ("rope.freq_base", float("nan")),
        ("rope.freq_base", -1.0),
        ("rope.freq_base", "ten thousand"),
        ("rope.scaling.type", "longrope"),
        ("rope.scaling.factor", float("inf")),
        ("rope.scaling.yarn_beta_fast", 32.0),
        ("rope.scaling.attn_factor", 1.2),
        ("rope.dimension_sections", [2, 2]),
        ("logit_scale", 8.0),
        ("embedding_scale", 12.0),
        ("residual_scale", 0.22),
        ("vocab_size", VOCABULARY + 1),
        ("block_count", 2),
        ("block_count", 4),
        ("block_count", 1 << 31),
        ("block_count", 0),
        ("block_count", -3),
        ("block_count", "3"),
        ("context_length", 0),
        ("embedding_length", 64),
        ("attention.layer_norm_rms_epsilon", 0.0),
        ("attention.layer_norm_epsilon", 1e-5),
        ("something_new", 1),
    ],
)
def test_what_the_stock_class_cannot_do_is_refused_by_key(
    key: str, value: Any, tmp_path: Path
) -> None:
    """One error names the key; an unknown one may change the result and is refused too."""
    path = write_gguf(tmp_path / "m.gguf", fields={f"llama.{key}": value})
    with pytest.raises(ModelSourceError) as caught:
        read_gguf(path)
    named = key.replace("key_length", "value_length")  # Widths that differ: the second is named.
    assert named in caught.value.message or "of another shape" in caught.value.message
    assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("expert_count", 0),
        ("attn_logit_softcapping", 0.0),
        ("attention.sliding_window", 256),
        ("attention.scale", 8**-0.5),
        ("attention.head_count_kv", [2, 2, 2]),
        ("rope.scaling.type", "none"),
        ("rope.scaling.factor", 1.0),
        ("rope.scaling.finetuned", True),
        ("pooling_type", 3),
        ("tensor_data_layout", "Meta AI original pth"),
        ("logit_scale", 1.0),
    ],
)
def test_a_key_that_changes_nothing_is_accepted(key: str, value: Any, tmp_path: Path) -> None:
    """Neutral values of keys that would otherwise be refused."""
    original = make_gguf_model()
    path = write_gguf(tmp_path / "m.gguf", original, fields={f"llama.{key}": value})
    assert_equal(read_gguf(path)[0], original)


def test_absent_keys_take_the_values_of_the_format(tmp_path: Path) -> None:
    """Without base, head widths and KV heads: 10,000, an even share, one for each head."""
    original = make_gguf_model(num_key_value_heads=4, rope_theta=10_000.0)
    absent = ("rope.freq_base", "attention.key_length", "attention.value_length", "vocab_size")
    absent = (*absent, "attention.head_count_kv", "rope.dimension_count")
    path = write_gguf(
        tmp_path / "m.gguf", original, fields=dict.fromkeys((f"llama.{k}" for k in absent), None)
    )
    assert_equal(read_gguf(path)[0], original)


@pytest.mark.parametrize("key", ["context_length", "block_count", "attention.head_count"])
def test_a_key_that_is_needed_and_absent_is_named(key: str, tmp_path: Path) -> None:
    """No size is guessed."""
    path = write_gguf(tmp_path / "m.gguf", fields={f"llama.{key}": None})
    with pytest.raises(ModelSourceError, match=f"states no llama.{key}"):
        read_gguf(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"general.type": "adapter"}, "general.type is 'adapter'"),
        ({"qwen2.block_count": 3}, "qwen2.block_count"),
        ({"clip.has_vision_encoder": True}, "clip.has_vision_encoder"),
        ({"adapter.type": "lora"}, "adapter.type"),
    ],
)
def test_files_that_are_no_plain_model_are_refused(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Adapters, projectors, and metadata of two architectures in one file."""
    with pytest.raises(ModelSourceError, match=message):
        read_gguf(write_gguf(tmp_path / "m.gguf", fields=fields))


@pytest.mark.parametrize("architecture", ["gemma2", "phi3", "qwen3moe", "mistral3", "no-such"])
def test_another_architecture_is_refused(architecture: str, tmp_path: Path) -> None:
    """What is not Llama, Qwen2, Qwen3 or Gemma 3 is named before any weight is read."""
    with pytest.raises(UnsupportedModelError, match=f"architecture '{architecture}'"):
        read_gguf(write_gguf(tmp_path / "m.gguf", architecture=architecture))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"blk.1.attn_q.weight": None}, "lacks 1 weight .*blk.1.attn_q.weight"),
        ({"output_norm.weight": None}, "lacks 1 weight .*output_norm.weight"),
        ({"token_embd.weight": None}, "no token_embd.weight"),
        ({"blk.0.attn_q.bias": np.ones(32, np.float32)}, "lacks 11 weights"),
        ({"blk.0.ffn_gate_inp.weight": np.ones((4, 32), np.float32)}, "ffn_gate_inp"),
        ({"blk.0.attn_q.scale": np.ones(1, np.float32)}, "attn_q.scale"),
        ({"output_norm.bias": np.ones(32, np.float32)}, "output_norm.bias"),
        ({"blk.00.attn_q.weight": np.ones((32, 32), np.float32)}, "blk.00.attn_q"),
        ({"blk.1.ffn_up.weight": np.ones((32, 48), np.float32)}, "another shape"),
        ({"blk.1.ffn_norm.weight": np.ones((1, 32), np.float32)}, "another shape"),
    ],
)
def test_missing_surplus_and_misshapen_tensors_are_named(
    tensors: dict[str, Any], message: str, tmp_path: Path
) -> None:
    """Every tensor belongs to one parameter, and every parameter comes from the file."""
    with pytest.raises(ModelSourceError, match=message):
        read_gguf(write_gguf(tmp_path / "m.gguf", tensors=tensors))


def test_a_missing_layer_is_named(tmp_path: Path) -> None:
    """A hole in the middle, as of a model put together by hand."""
    names = network_tensors(make_gguf_model(), "llama")
    with pytest.raises(ModelSourceError, match=r"lacks 9 weights .*blk\.1"):
        read_gguf(write_gguf(tmp_path / "m.gguf", tensors=without(names, "blk.1.")))


def write_parts(folder: Path, model: PreTrainedModel, count: int, **changed: Any) -> list[Path]:
    """A split model as llama-gguf-split writes it: the metadata only in the first part."""
    from tests.models.gguf_files import byte_level, token_fields

    tensors = network_tensors(model, "llama")
    names = list(tensors)
    share = -(-len(names) // count)
    paths = []
    for number in range(count):
        path = folder / f"m-{number + 1:05}-of-{count:05}.gguf"
        fields = {"split.no": number, "split.count": count, "split.tensors.count": len(names)}
        if number == 0:
            fields |= network_fields(model, "llama") | token_fields(byte_level(), "gpt-2")
        part = {n: tensors[n] for n in names[number * share : (number + 1) * share]}
        write_raw(path, "llama", {**fields, **changed.get(f"part{number}", {})}, part)
        paths.append(path)
    return paths


@pytest.mark.parametrize("given", [0, 1, 2])
def test_all_parts_of_a_split_model_are_read(given: int, tmp_path: Path) -> None:
    """Whichever part is named, through links too."""
    original = make_gguf_model()
    (tmp_path / "blobs").mkdir()
    for path in write_parts(tmp_path, original, 3):
        blob = path.rename(tmp_path / "blobs" / f"{path.stem[2:7]}.blob")
        path.symlink_to(blob)
    path = tmp_path / f"m-{given + 1:05}-of-00003.gguf"
    model, tokenizer = load(ModelSource(id=str(path), device="cpu"))
    assert_equal(model, original)
    assert tokenizer is not None


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    """With the remedy."""
    paths = write_parts(tmp_path, make_gguf_model(), 3)
    paths[1].unlink()
    with pytest.raises(ModelSourceError, match=r"first m-00002-of-00003\.gguf.*--merge"):
        read_gguf(paths[0])


@pytest.mark.parametrize(
    "changed",
    [
        {"part1": {"split.no": 2}},
        {"part1": {"split.count": 3}},
        {"part1": {"split.tensors.count": 5}},
        {"part0": {"split.tensors.count": 5}, "part1": {"split.tensors.count": 5}},
        {"part1": {"llama.block_count": 7}},
    ],
)
def test_parts_that_do_not_belong_together_are_refused(
    changed: dict[str, Any], tmp_path: Path
) -> None:
    """Another number, another count, other metadata."""
    paths = write_parts(tmp_path, make_gguf_model(), 2, **changed)
    with pytest.raises(ModelSourceError, match=r"--merge"):
        read_gguf(paths[0])


def test_a_renamed_part_is_refused(tmp_path: Path) -> None:
    """Its siblings cannot be found."""
    path = write_parts(tmp_path, make_gguf_model(), 2)[0].rename(tmp_path / "model.gguf")
    with pytest.raises(ModelSourceError, match="one part of 2"):
        read_gguf(path)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_quantised_weights_are_those_of_the_package(kind: str, tmp_path: Path) -> None:
    """Every format gives what `gguf` makes of it, in the order of the stock class."""
    original = make_gguf_model()
    quantised = gguf.GGMLQuantizationType[kind]
    tensors: dict[str, Any] = {}
    for name, values in network_tensors(original, "llama").items():
        if values.ndim == 2 and values.shape[1] % 32 == 0:
            tensors[name] = (gguf.quantize(values, quantised), quantised)
    model, _ = read_gguf(write_gguf(tmp_path / "m.gguf", original, tensors=tensors))
    assert model.dtype == torch.float32
    values = gguf.dequantize(*tensors["blk.1.ffn_up.weight"])
    assert torch.equal(model.model.layers[1].mlp.up_proj.weight, torch.from_numpy(values))
    found, wanted = (m.model.layers[2].self_attn.q_proj.weight for m in (model, original))
    assert bool(torch.isclose(found, wanted, atol=0.1).all())


def test_a_format_that_cannot_be_dequantised_is_named(tmp_path: Path) -> None:
    """Integers are no weights."""
    tensors = {"blk.1.ffn_norm.weight": np.ones(32, np.int32)}
    with pytest.raises(ModelSourceError, match=r"blk\.1\.ffn_norm\.weight as I32"):
        read_gguf(write_gguf(tmp_path / "m.gguf", tensors=tensors))


@pytest.mark.parametrize(("dtype", "wanted"), [("auto", "float32"), ("bfloat16", "bfloat16")])
def test_the_number_format_is_the_one_asked_for(dtype: str, wanted: str, tmp_path: Path) -> None:
    """The rotary frequencies stay in float32."""
    model, _ = load(
        ModelSource(id=str(write_gguf(tmp_path / "m.gguf")), dtype=dtype, device="cpu")  # type: ignore[arg-type]
    )
    assert model.dtype == getattr(torch, wanted)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """NaN in one of many tensors."""
    tensors = {"blk.1.attn_k.weight": np.full((16, 32), np.nan, np.float32)}
    with pytest.raises(ModelSourceError, match="NaN or infinity"):
        load(ModelSource(id=str(write_gguf(tmp_path / "m.gguf", tensors=tensors)), device="cpu"))


@pytest.mark.parametrize("name", ["m.gguf", "M.GGUF", "a b/m.gguf", "x/../m.gguf", "ü.gguf"])
def test_a_file_is_found_under_any_name(name: str, tmp_path: Path) -> None:
    """Capitals, spaces and steps upwards."""
    (tmp_path / "a b").mkdir()
    (tmp_path / "x").mkdir()
    path = tmp_path / name
    write_gguf(path)
    load(ModelSource(id=str(path), device="cpu"))


def test_a_folder_may_be_called_gguf(tmp_path: Path) -> None:
    """A checkpoint folder is one whatever its name."""
    folder = tmp_path / "m.gguf"
    original = make_gguf_model()
    original.save_pretrained(folder)
    assert not is_gguf(str(folder))
    assert_equal(load(ModelSource(id=str(folder), device="cpu"))[0], original)
    ModelSource(id=str(folder), memory="layerwise")


def test_a_second_reading_that_differs_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that arrive in the wrong order are noticed."""
    monkeypatch.setattr("slm_plugin.models.gguf.weights.halves", lambda rows, heads: rows)
    with pytest.raises(ModelSourceError, match=r"two readings .* differ in row 1 of blk\.0\.attn_"):
        read_gguf(write_gguf(tmp_path / "m.gguf"))


def test_frequencies_that_differ_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scaling that does not reach the model is noticed."""
    monkeypatch.setattr(
        "slm_plugin.models.gguf.reading.rope_fields", lambda rope, family: {"rope_theta": rope.base}
    )
    path = write_gguf(tmp_path / "m.gguf", fields={"llama.rope.scaling.factor": 4.0})
    with pytest.raises(ModelSourceError, match="rotary frequencies"):
        read_gguf(path)
