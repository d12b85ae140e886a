"""Checkpoints of all families: names and words of other releases are read, mistakes are told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from slm_plugin.errors import ModelSourceError, SlmError
from slm_plugin.models.loading import ModelSource, load
from tests.tiny import FAMILIES, command, make_model, random_tokens

TOKENS = random_tokens(2, 20)
FOUR = transformers.__version__.startswith("4.")


def saved(folder: Path, family: str, **settings: Any) -> PreTrainedModel:
    """A tiny model and its checkpoint."""
    model = make_model(family, **settings)
    model.save_pretrained(folder)
    return model


def changed(folder: Path, **fields: Any) -> None:
    """Change fields of the config; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def stored(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Change the stored tensors."""
    file = folder / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in change(load_file(file)).items()}
    save_file(tensors, file, metadata={"format": "pt"})


def same(folder: Path, model: PreTrainedModel) -> bool:
    """Whether what is read computes what the model computes."""
    read, _ = load(ModelSource(id=str(folder), device="cpu"))
    with torch.no_grad():
        return torch.equal(read(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_inspect_takes_every_family(tmp_path: Path, family: str) -> None:
    """Also those whose layers this release of transformers cannot read one at a time."""
    model = saved(tmp_path, family)
    shown = command("inspect", str(tmp_path), "--json")
    assert shown.returncode == 0, shown.stderr
    counted = json.loads(shown.stdout)["parameters"]
    assert sum(counted.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size"])
@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "opt", "falcon"])
def test_a_wrong_size_is_told_by_its_name_in_the_file(
    tmp_path: Path, family: str, field: str
) -> None:
    """GPT-2 writes `n_embd`: whoever is told to correct `hidden_size` finds none."""
    saved(tmp_path, family)
    own = FAMILIES[family][0].own_name(field)
    changed(tmp_path, **{own: json.loads((tmp_path / "config.json").read_text())[own] * 2})
    with pytest.raises(ModelSourceError) as caught:
        load(ModelSource(id=str(tmp_path), device="cpu"))
    assert f"correct {own}" in str(caught.value.hint)


def test_gpt2_as_it_was_first_published(tmp_path: Path) -> None:
    """Names without the prefix, masks among the weights, and no head, as it is the embedding."""
    model = saved(tmp_path, "gpt2", tie_word_embeddings=True)
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 256, 256).tril() for i in range(6)}
    stored(
        tmp_path,
        lambda t: {n.removeprefix("transformer."): v for n, v in t.items()} | masks,
    )
    assert same(tmp_path, model)


def test_an_untied_decoder_without_its_head_is_refused(tmp_path: Path) -> None:
    """Nothing is made up in place of a head that is missing."""
    saved(tmp_path, "gpt2", tie_word_embeddings=False)
    stored(tmp_path, lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"})
    with pytest.raises(ModelSourceError, match=r"lacks lm_head\.weight"):
        load(ModelSource(id=str(tmp_path), device="cpu"))


@pytest.mark.parametrize("name", ["embed_out", "lm_head"])
def test_the_head_of_gpt_neox_has_two_names(tmp_path: Path, name: str) -> None:
    """Of transformers 4.57 and of 5."""
    model = saved(tmp_path, "gpt_neox")
    heads = ("embed_out.weight", "lm_head.weight")
    stored(tmp_path, lambda t: {f"{name}.weight" if n in heads else n: v for n, v in t.items()})
    assert same(tmp_path, model)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_a_missing_expert_is_told(tmp_path: Path, family: str) -> None:
    """By the name that it has in the checkpoint."""
    saved(tmp_path, family)
    lost = next(
        n for n in load_file(tmp_path / "model.safetensors") if ".1." in n and "experts.2" in n
    )
    stored(tmp_path, lambda t: {n: v for n, v in t.items() if n != lost})
    with pytest.raises(ModelSourceError) as caught:
        load(ModelSource(id=str(tmp_path), device="cpu"))
    assert lost in str(caught.value) and "\n" not in str(caught.value)


def test_experts_may_be_counted_by_either_name(tmp_path: Path) -> None:
    """Qwen3-MoE of both releases; two numbers contradict each other."""
    model = saved(tmp_path, "qwen3_moe")
    for fields in (
        {"num_experts": 4, "num_local_experts": None},
        {"num_experts": None, "num_local_experts": 4},
    ):
        changed(tmp_path, **fields)
        assert same(tmp_path, model)
    changed(tmp_path, num_experts=4, num_local_experts=3)
    with pytest.raises(ModelSourceError, match="contradicts itself"):
        load(ModelSource(id=str(tmp_path), device="cpu"))


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"])
@pytest.mark.parametrize(
    ("chosen", "words"),
    [(5, "contradicts itself: num_experts_per_tok 5 and"), (None, "lacks num_experts_per_tok")],
)
def test_a_router_chooses_among_the_experts_there_are(
    tmp_path: Path, family: str, chosen: int | None, words: str
) -> None:
    """Classes find out in the first forward pass, and have another default number."""
    saved(tmp_path, family)
    changed(tmp_path, num_experts_per_tok=chosen)
    with pytest.raises(ModelSourceError, match=words) as caught:
        load(ModelSource(id=str(tmp_path), device="cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("family", ["llama", "stablelm", "phi3", "olmo2", "falcon"])
def test_no_number_of_kv_heads_means_one_for_each_head(tmp_path: Path, family: str) -> None:
    """Written as null; some classes would multiply by it."""
    model = saved(tmp_path, family, num_key_value_heads=4)
    file = tmp_path / "config.json"
    name = "num_kv_heads" if family == "falcon" else "num_key_value_heads"
    file.write_text(json.dumps(json.loads(file.read_text()) | {name: None}))
    assert same(tmp_path, model)


@pytest.mark.parametrize("words", ["4", "5"])
def test_both_rotary_tables_are_read_in_the_words_of_both_releases(
    tmp_path: Path, words: str
) -> None:
    """Gemma 3: one base per attention type."""
    model = saved(tmp_path, "gemma3")
    four: dict[str, Any] = {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}
    five = {
        "full_attention": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    none = dict.fromkeys([*four, "rope_scaling"])
    said = {**four, "rope_parameters": None} if words == "4" else {**none, "rope_parameters": five}
    changed(tmp_path, **said)
    assert same(tmp_path, model)


def test_positions_of_a_part_of_a_head_are_read_in_the_words_of_both_releases(
    tmp_path: Path,
) -> None:
    """StableLM and GPT-NeoX."""
    model = saved(tmp_path / "a", "stablelm")
    changed(tmp_path / "a", partial_rotary_factor=0.5, rope_theta=10_000.0, rope_parameters=None)
    assert same(tmp_path / "a", model)
    model = saved(tmp_path / "b", "gpt_neox")
    changed(
        tmp_path / "b",
        rotary_pct=None,
        rotary_emb_base=None,
        partial_rotary_factor=None,
        rope_theta=None,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": 10_000,
            "partial_rotary_factor": 0.5,
        },
    )
    assert same(tmp_path / "b", model)


def test_a_bound_of_the_scores_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """By `eager`, whatever the config asks for, with a line."""
    model = saved(tmp_path, "gemma2")
    changed(tmp_path, attn_implementation="sdpa")
    assert same(tmp_path, model)
    assert "eager is used instead" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
        ("opt", {"ffn_dim": 0}, "ffn_dim"),
        ("gpt2", {"n_layer": "six"}, "n_layer"),
        ("gpt2", {"n_head": 5}, "n_embd 32 is no multiple of n_head 5"),
        ("smollm3", {"no_rope_layers": [1, 0]}, "2 no_rope_layers"),
        ("gemma3", {"layer_types": ["full_attention"] * 5}, "5 layer_types"),
        ("gemma2", {"layer_types": ["other"] * 6}, "layer_types"),
        ("stablelm", {"head_dim": 16}, "head_dim 16"),
        ("granite", {"residual_multiplier": -1}, "residual_multiplier"),
        ("granite", {"sliding_window": 8}, "no window"),
        ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ("qwen2_moe", {"mlp_only_layers": [1]}, "mlp_only_layers"),
        ("qwen3_moe", {"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ("mixtral", {"num_local_experts": 5}, "experts|weights"),
        ("gpt_oss", {"quantization_config": {"quant_method": "mxfp4"}}, "mxfp4"),
        ("phi3", {"partial_rotary_factor": 2.0}, "partial_rotary_factor"),
        ("falcon", {"alibi": 1}, "alibi"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, family: str, fields: dict[str, Any], words: str
) -> None:
    """That names the field, in its own family's words."""
    saved(tmp_path, family)
    changed(tmp_path, **fields)
    with pytest.raises(SlmError, match=words) as caught:
        load(ModelSource(id=str(tmp_path), device="cpu"))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not FOUR, reason="transformers 5 has two bases")
def test_two_bases_of_olmo3_are_refused_where_the_class_has_one(tmp_path: Path) -> None:
    """Transformers 4.57 would silently compute other positions."""
    saved(tmp_path, "olmo3")
    tables = {
        "full_attention": {"rope_type": "default", "rope_theta": 500_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
    changed(tmp_path, rope_parameters=tables, rope_theta=None, rope_scaling=None)
    with pytest.raises(ModelSourceError, match="for sliding_attention"):
        load(ModelSource(id=str(tmp_path), device="cpu"))
