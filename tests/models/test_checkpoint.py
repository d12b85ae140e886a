"""Every tensor is used and every weight is stored, whichever way the checkpoint is read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.fingerprint import fingerprint
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.models.streaming import is_streamed
from tests.tiny import make_model, random_tokens

Memory = Literal["whole", "layerwise"]
MEMORIES = pytest.mark.parametrize("memory", ["whole", "layerwise"])
Tensors = dict[str, Tensor]


def edit(folder: Path, **fields: Any) -> None:
    """Change fields of a config."""
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8")) | fields
    file.write_text(json.dumps(content), encoding="utf-8")


def change(folder: Path, how: Callable[[Tensors], Tensors]) -> None:
    """Change the tensors of a checkpoint."""
    file = folder / "model.safetensors"
    save_file(how(load_file(file)), file, metadata={"format": "pt"})


def read(folder: Path, memory: Memory) -> PreTrainedModel:
    """Load a checkpoint."""
    return load(ModelSource(id=str(folder), device="cpu", memory=memory))[0]


def without(name: str) -> Callable[[Tensors], Tensors]:
    """Leave one tensor out."""
    return lambda tensors: {n: t for n, t in tensors.items() if n != name}


def renamed(rename: Callable[[str], str]) -> Callable[[Tensors], Tensors]:
    """Give tensors other names."""
    return lambda tensors: {rename(name): tensor for name, tensor in tensors.items()}


def added(**tensors: Tensor) -> Callable[[Tensors], Tensors]:
    """Put tensors beside those that are there; `__` in a name is a dot."""
    more = {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    return lambda found: found | more


Q0 = "model.layers.0.self_attn.q_proj.weight"


@MEMORIES
@pytest.mark.parametrize(
    ("how", "fields", "words"),
    [
        (without("model.norm.weight"), {}, "lacks 1 weight .*: model.norm.weight"),
        (without("model.embed_tokens.weight"), {}, "lacks 1 weight .*model.embed_tokens.weight"),
        (without("lm_head.weight"), {}, "lacks lm_head.weight"),
        (added(score__weight=torch.ones(2, 32)), {}, "does not account for: score.weight"),
        (added(lm_head__bias=torch.ones(128)), {}, "does not account for: lm_head.bias"),
        (added(model__layers__0__self_attn__q_norm__weight=torch.ones(8)), {}, "q_norm"),
        (added(model__layers__3__self_attn__q_proj__bias=torch.ones(32)), {}, "q_proj.bias"),
        (lambda t: t | {Q0: t[Q0][:, :16].contiguous()}, {}, r"\[32, 16\] instead of \[32, 32\]"),
        (lambda t: t, {"num_hidden_layers": 4}, "weights of 6 layers, but its config says .* 4"),
        (lambda t: t, {"num_hidden_layers": 10**9}, "weights of 6 layers, .* 1000000000"),
        (lambda t: t, {"vocab_size": 2**31 - 1}, "vocab_size 2147483647"),
        (lambda t: t, {"hidden_size": 64, "head_dim": 8}, "has hidden_size 64 in its config"),
        (lambda t: t, {"intermediate_size": 10**9}, "intermediate_size 1000000000"),
        (lambda t: t, {"num_attention_heads": 8}, "num_attention_heads 8 and heads of 8"),
        (lambda t: t, {"num_key_value_heads": 4}, "num_key_value_heads 4"),
        (lambda t: t, {"head_dim": 16}, "heads of 16"),
        (lambda t: t, {"attention_bias": True}, "lacks 24 weights"),
        (
            lambda t: {n: x for n, x in t.items() if "layers.2." not in n},
            {},
            "lacks layers: of 6 it holds 5",
        ),
        (
            added(model__layers__9__mlp__up_proj__weight=torch.ones(48, 32)),
            {},
            "does not account for: model.layers.9.mlp.up_proj.weight",
        ),
        (
            added(model__layers__999999999__mlp__up_proj__weight=torch.ones(48, 32)),
            {"num_hidden_layers": 10**9},
            "lacks layers: of 1000000000 it holds 7",
        ),
        (
            renamed(lambda n: n.replace("layers.5.", f"layers.{'9' * 5000}.")),
            {},
            "weights of 5 layers, but its config says num_hidden_layers 6",
        ),
        (renamed(lambda n: n.removeprefix("model.")), {}, "names lack 'model.'"),
        (renamed(lambda n: f"module.{n}"), {}, "begin with 'module.'"),
        (renamed(lambda n: f"base_model.model.{n}"), {}, "begin with 'base_model.model.'"),
        (lambda t: t, {"tie_word_embeddings": True}, "holds a head of its own"),
        (
            added(model__layers__1__self_attn__rotary_emb__inv_freq=torch.ones(4)),
            {},
            "other rotary frequencies",
        ),
    ],
)
def test_weights_and_config_fit_or_are_refused(
    tmp_path: Path,
    how: Callable[[Tensors], Tensors],
    fields: dict[str, Any],
    words: str,
    memory: Memory,
) -> None:
    """Names, counts and a remedy in one line, before a module is built."""
    make_model().save_pretrained(tmp_path)
    change(tmp_path, how)
    edit(tmp_path, **fields)
    with pytest.raises(ModelSourceError, match=words) as caught:
        read(tmp_path, memory)
    assert caught.value.hint and "\n" not in caught.value.message


@MEMORIES
def test_a_head_that_is_the_embedding_may_be_stored(tmp_path: Path, memory: Memory) -> None:
    """Beside tied embeddings an equal head is redundant, in whatever format."""
    model = make_model(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    embedding = model.model.embed_tokens.weight.detach().clone()
    change(tmp_path, lambda t: t | {"lm_head.weight": embedding.double()})
    found = read(tmp_path, memory)
    assert fingerprint(found) == fingerprint(model)
    assert found.lm_head.weight is found.model.embed_tokens.weight


@MEMORIES
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_rotary_frequencies_of_old_releases_are_redundant(
    tmp_path: Path, memory: Memory, dtype: torch.dtype
) -> None:
    """They follow from the config; rounding to a narrow format is allowed for."""
    model = make_model()
    model.save_pretrained(tmp_path)
    stored = model.model.rotary_emb.inv_freq.to(dtype)
    names = [f"model.layers.{i}.self_attn.rotary_emb.inv_freq" for i in range(6)]
    change(tmp_path, lambda t: t | {name: stored.clone() for name in names})
    assert fingerprint(read(tmp_path, memory)) == fingerprint(model)


@pytest.mark.parametrize("scaled", [False, True])
def test_rotary_frequencies_may_be_stored_before_scaling(tmp_path: Path, scaled: bool) -> None:
    """A config that scales positions goes with frequencies of both kinds, and with no others."""
    scaling = {"rope_type": "linear", "factor": 2.0}
    model, plain = make_model(rope_scaling=scaling), make_model()
    model.save_pretrained(tmp_path)
    stored = (model if scaled else plain).model.rotary_emb.inv_freq
    assert not torch.equal(model.model.rotary_emb.inv_freq, plain.model.rotary_emb.inv_freq)
    change(tmp_path, lambda t: t | {"model.rotary_emb.inv_freq": stored.clone()})
    assert fingerprint(read(tmp_path, "whole")) == fingerprint(model)
    change(
        tmp_path, lambda t: t | {"model.rotary_emb.inv_freq": 2 * plain.model.rotary_emb.inv_freq}
    )
    with pytest.raises(ModelSourceError, match="other rotary frequencies"):
        read(tmp_path, "whole")


def test_both_ways_read_the_same(tmp_path: Path, family: str) -> None:
    """Logits, settings and number format; one keeps its layers on disk."""
    model = make_model(family)
    model.save_pretrained(tmp_path)
    whole, layerwise = read(tmp_path, "whole"), read(tmp_path, "layerwise")
    tokens = random_tokens(1, 9)
    with torch.inference_mode():
        assert torch.equal(whole(tokens).logits, model(tokens).logits)
        assert torch.equal(layerwise(tokens).logits, model(tokens).logits)
    assert whole.config.to_dict() == layerwise.config.to_dict()
    assert whole.generation_config.to_dict() == layerwise.generation_config.to_dict()
    assert not is_streamed(whole) and is_streamed(layerwise)
    assert not whole.training


@MEMORIES
def test_return_values_do_not_depend_on_the_config(tmp_path: Path, memory: Memory) -> None:
    """A config that asks for tuples would make every forward pass fail."""
    make_model().save_pretrained(tmp_path)
    edit(tmp_path, return_dict=False, output_hidden_states=True, torchscript=True)
    output = read(tmp_path, memory)(random_tokens(1, 4))
    assert output.logits.shape == (1, 4, 128) and output.hidden_states is None


def test_no_adapter_is_ever_loaded(tmp_path: Path) -> None:
    """Transformers adds an adapter that lies beside the weights by itself, if peft is there."""
    make_model().save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelSourceError, match="adapter") as caught:
        read(tmp_path, "whole")
    assert "merge" in caught.value.hint
