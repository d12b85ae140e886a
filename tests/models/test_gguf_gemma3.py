"""GGUF files of Gemma 3: two types of attention, two rotary tables, norms stored with 1 added."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from transformers import PreTrainedModel

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.border import is_transformers_four
from slm_plugin.models.gguf import read_gguf
from slm_plugin.models.loading import ModelSource, load
from tests.models.gguf_files import make_gguf_model, network_fields, without, write_gguf
from tests.models.test_gguf import assert_equal

SLIDING, FULL = "sliding_attention", "full_attention"


def write(path: Path, original: PreTrainedModel | None = None, **changed: Any) -> Path:
    """A tiny file; keys are given without the architecture's name."""
    fields = {f"gemma3.{key}": value for key, value in changed.pop("fields", {}).items()}
    original = original or make_gguf_model("gemma3")
    return write_gguf(path, original, "gemma3", fields=fields, **changed)


def rotary(model: Any, kind: str) -> torch.Tensor:
    """Frequencies of layers of one attention type, in either line of transformers."""
    decoder = model.model
    if is_transformers_four():
        table = decoder.rotary_emb if kind == FULL else decoder.rotary_emb_local
        return torch.as_tensor(table.inv_freq)
    return torch.as_tensor(getattr(decoder.rotary_emb, f"{kind}_inv_freq"))


def base_of(frequencies: torch.Tensor, width: int = 8) -> float:
    """The base that the second frequency is a power of."""
    return float(frequencies[1]) ** (-width / 2)


def test_norms_lose_the_1_that_converters_add(tmp_path: Path) -> None:
    """All seven kinds of them; other tensors keep what they have."""
    path = write(tmp_path / "m.gguf")
    stored = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(path).tensors}
    model = read_gguf(path)[0]
    layer = model.model.layers[1]
    norms = {
        "blk.1.attn_norm": layer.input_layernorm,
        "blk.1.attn_q_norm": layer.self_attn.q_norm,
        "blk.1.attn_k_norm": layer.self_attn.k_norm,
        "blk.1.post_attention_norm": layer.post_attention_layernorm,
        "blk.1.ffn_norm": layer.pre_feedforward_layernorm,
        "blk.1.post_ffw_norm": layer.post_feedforward_layernorm,
        "output_norm": model.model.norm,
    }
    for name, norm in norms.items():
        assert np.array_equal(norm.weight.detach().numpy() + 1, stored[f"{name}.weight"]), name
    assert np.array_equal(
        layer.self_attn.q_proj.weight.detach().numpy(), stored["blk.1.attn_q.weight"]
    )


@pytest.mark.parametrize(
    ("pattern", "kinds"),
    [
        (None, [SLIDING] * 5 + [FULL, SLIDING]),
        (6, [SLIDING] * 5 + [FULL, SLIDING]),
        (2, [SLIDING, FULL] * 3 + [SLIDING]),
        (1, [FULL] * 7),
        (100, [SLIDING] * 7),
        ([False, True, True, False, False, True, False], None),
    ],
)
def test_the_pattern_says_which_layers_slide(
    pattern: Any, kinds: list[str] | None, tmp_path: Path
) -> None:
    """Every sixth has full attention unless the file says otherwise, also after saving."""
    kinds = kinds or [SLIDING if slides else FULL for slides in pattern]
    original = make_gguf_model("gemma3", num_hidden_layers=7, layer_types=kinds)
    fields = {"attention.sliding_window_pattern": pattern}
    model, _ = read_gguf(write(tmp_path / "m.gguf", original, fields=fields))
    assert model.config.layer_types == kinds
    assert [layer.self_attn.sliding_window for layer in model.model.layers] == [
        8 if kind == SLIDING else None for kind in kinds
    ]
    assert_equal(model, original)
    model.save_pretrained(tmp_path / "saved")
    assert_equal(load(ModelSource(id=str(tmp_path / "saved"), device="cpu"))[0], original)


@pytest.mark.parametrize("local", [None, 10_000.0, 500.0])
def test_each_type_of_attention_has_its_base(local: float | None, tmp_path: Path) -> None:
    """The stated one for full attention; 10,000 or another stated one where it slides."""
    fields = {"rope.freq_base": 2e6, "rope.freq_base_swa": local}
    model, _ = read_gguf(write(tmp_path / "m.gguf", fields=fields))
    assert base_of(rotary(model, FULL)) == pytest.approx(2e6, rel=1e-4)
    assert base_of(rotary(model, SLIDING)) == pytest.approx(local or 10_000.0, rel=1e-4)


def test_scaling_is_of_full_attention_alone(tmp_path: Path) -> None:
    """As the sizes with images have it."""
    original = make_gguf_model("gemma3", rope_scaling={"rope_type": "linear", "factor": 8.0})
    fields = {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0}
    model, _ = read_gguf(write(tmp_path / "m.gguf", original, fields=fields))
    assert_equal(model, original)
    plain, _ = read_gguf(write(tmp_path / "plain.gguf"))
    assert torch.allclose(rotary(model, FULL) * 8, rotary(plain, FULL))
    assert torch.equal(rotary(model, SLIDING), rotary(plain, SLIDING))


def test_the_largest_model_scales_attention_by_the_mean_head(tmp_path: Path) -> None:
    """62 layers are Gemma 3 27B, whose heads are wider than their share; others go by the head."""
    sizes = {"head_dim": 16, "sliding_window_pattern": 6}
    for layers, width in ((62, 8), (61, 16)):
        original = make_gguf_model(
            "gemma3", num_hidden_layers=layers, query_pre_attn_scalar=width, **sizes
        )
        model, _ = read_gguf(write(tmp_path / "m.gguf", original))
        assert model.config.query_pre_attn_scalar == width
        assert_equal(model, original)


def test_a_bound_of_the_logits_is_read(tmp_path: Path) -> None:
    """Gemma 3 has none, models of its class may; 0 is none."""
    original = make_gguf_model("gemma3", final_logit_softcapping=3.0)
    fields = {"final_logit_softcapping": 3.0}
    assert_equal(read_gguf(write(tmp_path / "m.gguf", original, fields=fields))[0], original)
    plain, _ = read_gguf(write(tmp_path / "m.gguf", fields={"final_logit_softcapping": 0.0}))
    assert plain.config.final_logit_softcapping is None


def test_a_tied_model_in_bfloat16(tmp_path: Path) -> None:
    """The 1 is taken off before rounding."""
    original = make_gguf_model("gemma3", tie_word_embeddings=True)
    norm = np.full(32, 1 + 2**-12, np.float32)
    path = write(tmp_path / "m.gguf", original, tensors={"blk.0.ffn_norm.weight": norm})
    model, _ = read_gguf(path, dtype="bfloat16")
    weight = model.model.layers[0].pre_feedforward_layernorm.weight
    assert weight.dtype == torch.bfloat16 and bool((weight == 2**-12).all())
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.parametrize("name", ["post_attention_norm", "post_ffw_norm", "attn_q_norm"])
def test_a_missing_norm_is_named(name: str, tmp_path: Path) -> None:
    """No norm is taken for one of ones."""
    names = [f"blk.{layer}.{name}.weight" for layer in range(3)]
    tensors = without(names, "blk.1.")
    with pytest.raises(ModelSourceError, match=rf"lacks 1 weight .*blk\.1\.{name}\.weight"):
        read_gguf(write(tmp_path / "m.gguf", tensors=tensors))


@pytest.mark.parametrize("name", ["blk.0.post_norm.weight", "rope_freqs.weight"])
def test_a_surplus_tensor_is_named(name: str, tmp_path: Path) -> None:
    """Also one that other architectures have."""
    tensors = {name: np.ones(4, np.float32)}
    with pytest.raises(ModelSourceError, match=f"does not account for: {name}"):
        read_gguf(write(tmp_path / "m.gguf", tensors=tensors))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("something_new", 1),
        ("attn_logit_softcapping", 50.0),
        ("final_logit_softcapping", -1.0),
        ("embedding_scale", 1.0),
        ("attention.scale", 0.5),
        ("attention.sliding_window", 0),
        ("attention.sliding_window", -8),
        ("attention.sliding_window_pattern", 0),
        ("attention.sliding_window_pattern", [True, False]),
        ("attention.sliding_window_pattern", [1, 1, 0]),
        ("attention.key_length_swa", 8),
        ("rope.freq_base_swa", float("inf")),
        ("rope.scaling.type", "yarn"),
        ("rope.local_freq_base", 10_000.0),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_key(key: str, value: Any, tmp_path: Path) -> None:
    """One line names the key."""
    with pytest.raises(ModelSourceError, match=rf"gemma3\.{key} ") as caught:
        read_gguf(write(tmp_path / "m.gguf", fields={key: value}))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("key", ["attention.sliding_window", "rope.freq_base"])
def test_a_key_that_is_needed_and_absent_is_named(key: str, tmp_path: Path) -> None:
    """Neither window nor global base is guessed."""
    with pytest.raises(ModelSourceError, match=f"states no gemma3.{key}"):
        read_gguf(write(tmp_path / "m.gguf", fields={key: None}))


def test_keys_of_gemma_are_refused_elsewhere(tmp_path: Path) -> None:
    """A Llama has no pattern and no second base."""
    for key, value in (("rope.freq_base_swa", 1e4), ("attention.sliding_window_pattern", 6)):
        with pytest.raises(ModelSourceError, match=rf"llama\.{key}"):
            read_gguf(write_gguf(tmp_path / "m.gguf", fields={f"llama.{key}": value}))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sliding_window": 4}, "the sliding window of layer 0"),
        ({"layer_types": [FULL] * 3}, "the sliding window of layer 0"),
        ({"query_pre_attn_scalar": 4}, "the scale of attention of layer 0"),
    ],
)
def test_a_second_reading_that_differs_is_an_error(
    changed: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows, types and scales that do not reach the model are noticed."""
    from slm_plugin.models.gguf import reading

    right = reading._sliding_fields
    monkeypatch.setattr(reading, "_sliding_fields", lambda network: {**right(network), **changed})
    with pytest.raises(ModelSourceError, match=f"differ in {message}"):
        read_gguf(write(tmp_path / "m.gguf"))


def test_a_local_base_that_is_lost_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two tables are compared, each with its own base."""
    from dataclasses import replace

    from slm_plugin.models.gguf import reading

    right = reading.rope_fields
    monkeypatch.setattr(
        reading, "rope_fields", lambda rope, family: right(replace(rope, local_base=5e4), family)
    )
    with pytest.raises(ModelSourceError, match=r"rotary frequencies \(default, sliding_attention"):
        read_gguf(write(tmp_path / "m.gguf"))


def test_a_1_that_stays_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms are compared, too."""
    from slm_plugin.models.gguf import reading, weights

    monkeypatch.setattr(
        reading,
        "parameter_values",
        lambda tensor, place, network: torch.from_numpy(weights.dequantised(place)),
    )
    with pytest.raises(ModelSourceError, match=r"differ in row 0 of blk\.0\.\w+_norm\.weight"):
        read_gguf(write(tmp_path / "m.gguf"))


@pytest.mark.skipif(is_transformers_four(), reason="transformers 4 takes such sizes")
def test_sizes_that_transformers_5_refuses_are_one_line(tmp_path: Path) -> None:
    """It wants whole shares of the residual stream for heads, also where they are not used."""
    original = make_gguf_model("gemma3")
    fields = {"attention.head_count": 3, "attention.head_count_kv": 3}
    with pytest.raises(ModelSourceError, match=r"does not take .*multiple") as caught:
        read_gguf(write(tmp_path / "m.gguf", original, fields=fields))
    assert "\n" not in caught.value.message


def test_the_config_is_that_of_the_text_model(tmp_path: Path) -> None:
    """What the file does not state is as Google published it."""
    fields = network_fields(make_gguf_model("gemma3"), "gemma3")
    assert fields["gemma3.rope.freq_base"] == 1_000_000.0
    config = read_gguf(write(tmp_path / "m.gguf"))[0].config
    assert isinstance(config, transformers.Gemma3TextConfig)
    assert config.architectures == ["Gemma3ForCausalLM"]
    assert config.hidden_activation == "gelu_pytorch_tanh"
    assert config.query_pre_attn_scalar == config.head_dim
    assert config.attn_logit_softcapping is None
