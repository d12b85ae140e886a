"""Check the fields of ``config.json`` before a library reads them.

Versions of transformers check different fields, by different rules, some not at all: a string for
a size can surface as a TypeError deep inside a module, a zero as a division in a forward pass.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.config_values import (
    Field,
    Where,
    activation,
    count,
    optional,
    positive,
    problem,
    share,
    token,
    tokens,
    truth,
    whole,
)
from slm_plugin.models.families.family import FULL, SLIDING, Family

# transformers writes all of these; a default of its own would be another model.
REQUIRED: dict[str, Field] = {
    "hidden_size": count,
    "intermediate_size": count,
    "num_hidden_layers": count,
    "num_attention_heads": count,
    "vocab_size": count,
}
OPTIONAL: dict[str, Field] = {
    "num_key_value_heads": optional(count),
    "head_dim": optional(count),
    "max_position_embeddings": count,
    "sliding_window": optional(count),
    "max_window_layers": whole,
    "hidden_act": activation,
    "rms_norm_eps": positive,
    "initializer_range": share,
    "attention_dropout": share,
    "attention_bias": truth,
    "mlp_bias": truth,
    "use_sliding_window": truth,
    "use_cache": truth,
    "tie_word_embeddings": truth,
    "pad_token_id": optional(token),
    "bos_token_id": optional(token),
    "eos_token_id": optional(tokens),
}
# Fields that would make another model of the stock class, or that two releases read differently.
FOREIGN = (
    "pruned_heads",
    "per_layer_config",
    "is_encoder_decoder",
    "add_cross_attention",
    "text_config",
    "decoder",
    "encoder",
    "generator",
)
# What some classes compute with and others do not look at: the value with which it makes no
# difference. A checkpoint that states another one was made for a class that reads it.
NEUTRAL: dict[str, Any] = {
    "attn_logit_softcapping": None,
    "final_logit_softcapping": None,
    "query_pre_attn_scalar": None,
    "attention_multiplier": None,
    "embedding_multiplier": 1,
    "residual_multiplier": 1,
    "logits_scaling": 1,
    "logit_scale": 1,
    "scale_emb": 1,
    "clip_qkv": None,
    "use_qk_norm": False,
    "qk_layernorm": False,
    "rope_interleaved": False,
    "rope_local_base_freq": None,
    "use_mrope": False,
    "no_rope_layers": None,
    "sliding_window_pattern": None,
    "attention_chunk_size": None,
    "alibi": False,
    "use_parallel_residual": False,
    "parallel_attn": False,
    "is_causal": True,
    "use_bidirectional_attention": False,
    "hidden_activation": None,
}


def check_fields(config: Mapping[str, Any], family: Family, where: Where) -> None:
    """Check sizes, numbers and switches, individually and together.

    Raises:
        ModelSourceError: A field is missing, of the wrong type or out of range, or two fields
            contradict each other.
    """
    config = family.canonical(config)
    for name, check in REQUIRED.items():
        own = family.own_name(name)
        if name in config:
            check(where.at(own), config[name])
        elif family.names.get(name, name) is not None:
            raise ModelSourceError(f"{where} lacks {own}", hint="it describes no whole model")
    for name, check in {**OPTIONAL, **family.fields}.items():
        if name in config:
            check(where.at(family.own_name(name)), config[name])
    for name in FOREIGN:
        if config.get(name) and name not in family.reads:
            raise problem(where.at(name), config[name], f"absent: no {family.model_type} has it")
    for name, neutral in NEUTRAL.items():
        found = config.get(name)
        if name in family.reads or found is None or found == neutral:
            continue
        if not _is_every_layer(name, found):
            wanted = "absent" if neutral is None else f"absent or {json.dumps(neutral)}"
            raise problem(where.at(name), found, f"{wanted}: no {family.model_type} has it")
    pad, rows = config.get("pad_token_id"), config["vocab_size"]
    if pad is not None and pad >= rows:
        raise where.contradiction(f"pad_token_id {pad} and vocab_size {rows}")
    _heads(config, family, where)
    _experts(config, family, where)
    _layer_lists(config, family, where)
    _layer_types(config, family, where)


def head_dim(config: Mapping[str, Any], family: Family) -> int:
    """Length of a head: stated, or the family's own default."""
    config = family.canonical(config)
    stated = config.get("head_dim")
    if stated is None and "head_dim" not in config and family.default_head_dim is not None:
        return family.default_head_dim
    return int(stated or config["hidden_size"] // config["num_attention_heads"])


def _is_every_layer(name: str, found: Any) -> bool:
    """Whether it says that all layers have positions, as in most families."""
    return name == "no_rope_layers" and isinstance(found, list) and all(one == 1 for one in found)


def _heads(config: Mapping[str, Any], family: Family, where: Where) -> None:
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    of_heads, of_hidden = map(family.own_name, ("num_attention_heads", "hidden_size"))
    groups = config.get("num_key_value_heads") or heads
    if heads % groups:
        raise where.contradiction(
            f"{of_heads} {heads} is no multiple of {family.own_name('num_key_value_heads')} "
            f"{groups}"
        )
    size = head_dim(config, family)
    stated = config.get("head_dim") is not None or family.default_head_dim is not None
    if not stated and hidden % heads:
        raise where.contradiction(
            f"{of_hidden} {hidden} is no multiple of {of_heads} {heads}, and no head_dim is given"
        )
    if not family.own_head_dim and size * heads != hidden:
        raise where.contradiction(
            f"head_dim {size}, and a {family.model_type}, which has {of_hidden} {hidden} / "
            f"{of_heads} {heads}"
        )
    if size % 2 and family.rotary != "none":
        raise problem(where.at("head_dim"), size, "even: positions turn pairs of channels")


def _experts(config: Mapping[str, Any], family: Family, where: Where) -> None:
    """A router chooses among the experts that there are; releases differ in the default number."""
    if not family.router:
        return
    chosen = config.get("num_experts_per_tok")
    if chosen is None:
        raise ModelSourceError(
            f"{where} lacks num_experts_per_tok", hint="it describes no whole model"
        )
    for name in ("num_experts", "num_local_experts"):
        there = config.get(name)
        if there is not None and chosen > there:
            raise where.contradiction(f"num_experts_per_tok {chosen} and {name} {there}")


def _layer_lists(config: Mapping[str, Any], family: Family, where: Where) -> None:
    """Lists that make layers differ have one entry per layer."""
    layers = config["num_hidden_layers"]
    for name in family.kind_fields:
        found = config.get(name)
        if found is not None and len(found) != layers:
            raise where.contradiction(f"num_hidden_layers {layers} and {len(found)} {name}")


def _layer_types(config: Mapping[str, Any], family: Family, where: Where) -> None:
    """Windows by layer; a list that is too short or a window without a width is another model."""
    layers, kinds = config["num_hidden_layers"], config.get("layer_types")
    name, width = family.model_type, config.get("sliding_window")
    if family.window == "none" and width is not None:
        raise where.contradiction(f"sliding_window, and a {name}, which has no window")
    if config.get("num_kv_shared_layers"):
        raise where.contradiction(f"num_kv_shared_layers, and a {name}, which shares none")
    if kinds is None:
        return
    known = (FULL, SLIDING)
    if not isinstance(kinds, list) or any(kind not in known for kind in kinds):
        raise problem(where.at("layer_types"), kinds, f"null or a list of {' and '.join(known)}")
    if len(kinds) != layers:
        raise where.contradiction(f"num_hidden_layers {layers} and {len(kinds)} layer_types")
    # Some classes have one kind for all layers and do not look at the list.
    only = {"none": FULL, "all": FULL if width is None else SLIDING}.get(family.window)
    if only is not None and set(kinds) != {only}:
        raise where.contradiction(
            f"layer_types with {' and '.join(sorted(set(kinds)))}, and a {name} of this "
            f"sliding_window, whose layers all have {only}"
        )
    switched = family.window == "switched" and not config.get("use_sliding_window", False)
    # Classes with a window by kind have a width by default.
    default = family.window == "by_kind" and "sliding_window" not in config
    if SLIDING in kinds and (switched or (width is None and not default)):
        raise where.contradiction("layer_types has sliding_attention, but there is no window")
