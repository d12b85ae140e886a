"""GGUF files of tiny models, written with the `gguf` package, right or wrong on purpose."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel

from tests.tiny import make_model

VOCABULARY = 340
CORPUS = [
    "the river rose and the miller moved his grain to the loft and waited for rain to stop",
    "see example.com and (self.name) = 20240131; the year 2024\n\n\nnew line don't I'LL 3.14",
    "  indented\n    code  # 17\r\n\tnaïve café Zürich Москва 東京 \n\n5",
] * 20
_MODULES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "q_norm": "attn_q_norm",
    "k_norm": "attn_k_norm",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
}
# Gemma's layers have four norms: the second one stands behind the attention.
_GEMMA3 = {
    **_MODULES,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def make_gguf_model(family: str = "llama", **overrides: Any) -> PreTrainedModel:
    """A tiny model with room for a byte-level vocabulary.

    The weights of its norms are coarse, so that 1 can be added and taken off without rounding.
    """
    model = make_model(family, **{"vocab_size": VOCABULARY, "num_hidden_layers": 3, **overrides})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_((parameter * 1024).round() / 1024)
    return model


def byte_level(cut: Any = None, *, size: int = VOCABULARY) -> Tokenizer:
    """A trained byte-level tokenizer of exactly ``size`` tokens, the first three special."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = cut or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    assert backend.get_vocab_size() == size
    return backend


def split_cut(*patterns: str) -> Any:
    """Regular expressions one after the other, then bytes."""
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([*steps, last])


def token_fields(backend: Tokenizer, pre: str) -> dict[str, Any]:
    """The metadata of a byte-level tokenizer."""
    import json

    model = json.loads(backend.to_str())["model"]
    tokens = sorted(model["vocab"], key=lambda token: int(model["vocab"][token]))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3, 3, 3] + [1] * (len(tokens) - 3),
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }


def network_fields(model: PreTrainedModel, architecture: str) -> dict[str, Any]:
    """The metadata of a network."""
    config = model.config
    theta = getattr(config, "rope_theta", None)
    if theta is None:
        found = config.rope_parameters
        theta = found.get("full_attention", found)["rope_theta"]
    own: dict[str, Any] = {}
    if architecture == "gemma3":
        own["attention.sliding_window"] = config.sliding_window
        own["attention.sliding_window_pattern"] = config._sliding_window_pattern
    return {
        f"{architecture}.{key}": value
        for key, value in {
            "context_length": config.max_position_embeddings,
            "embedding_length": config.hidden_size,
            "block_count": config.num_hidden_layers,
            "feed_forward_length": config.intermediate_size,
            "attention.head_count": config.num_attention_heads,
            "attention.head_count_kv": config.num_key_value_heads,
            "attention.key_length": config.head_dim,
            "attention.value_length": config.head_dim,
            "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
            "rope.dimension_count": config.head_dim,
            "rope.freq_base": float(theta),
            "vocab_size": config.vocab_size,
            **own,
        }.items()
    }


def network_tensors(model: PreTrainedModel, architecture: str) -> dict[str, Any]:
    """The tensors of a network, Llama's queries and keys in pairs, Gemma's norms with 1 added."""
    config = model.config
    found = {}
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        short = (_GEMMA3 if architecture == "gemma3" else _MODULES)[parts[-2]]
        values = parameter.detach().float().numpy()
        if architecture == "gemma3" and short.endswith("norm"):
            values = values + 1
        if architecture == "llama" and short in ("attn_q", "attn_k"):
            heads = config.num_attention_heads if short == "attn_q" else config.num_key_value_heads
            split = values.reshape(heads, 2, -1, *values.shape[1:])
            values = split.swapaxes(1, 2).reshape(values.shape)
        layer = f"blk.{parts[2]}." if "layers" in parts else ""
        found[f"{layer}{short}.{parts[-1]}"] = np.ascontiguousarray(values)
    return found


def write_gguf(
    path: Path,
    model: PreTrainedModel | None = None,
    architecture: str = "llama",
    *,
    fields: Mapping[str, Any] | None = None,
    tensors: Mapping[str, Any] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
) -> Path:
    """Write a model; a field or tensor that is given replaces the right one, None leaves it out."""
    model = model or make_gguf_model()
    tokens = token_fields(byte_level(), "gpt-2") if tokenizer is None else tokenizer
    stated = {**network_fields(model, architecture), **tokens, **(fields or {})}
    stored = {**network_tensors(model, architecture), **(tensors or {})}
    write_raw(path, architecture, stated, stored)
    return path


def write_raw(
    path: Path, architecture: str, fields: Mapping[str, Any], tensors: Mapping[str, Any]
) -> None:
    """Write fields and tensors as they are; a tensor may be a pair of bytes and their format."""
    from gguf import GGUFWriter

    writer = GGUFWriter(path, architecture)
    for key, value in fields.items():
        put(writer, key, value)
    for name, values in tensors.items():
        if isinstance(values, tuple):
            writer.add_tensor(name, values[0], raw_dtype=values[1])
        elif values is not None:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def put(writer: Any, key: str, value: Any) -> None:
    """Add a field in the type that converters use for such a value."""
    if value is None:
        return
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        (writer.add_int32 if value < 0 else writer.add_uint32)(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, value)


def without(names: Collection[str], *prefixes: str) -> dict[str, None]:
    """The names that begin with a prefix, each to be left out."""
    return {name: None for name in names if name.startswith(prefixes)}
