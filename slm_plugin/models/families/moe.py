"""Mixtures of experts: Mixtral, Qwen2-MoE, Qwen3-MoE, gpt-oss.

transformers 5 holds all experts of a layer in one tensor where 4.57 has a module for each; the
checkpoints of both name every expert, except gpt-oss's.
"""

from __future__ import annotations

from typing import Any

from slm_plugin.extras import found_version
from slm_plugin.models.config_values import (
    count,
    only,
    optional,
    positive,
    problem,
    share,
    truth,
    whole,
)
from slm_plugin.models.families.family import SEPARATE, Family

FUSES = not (found_version("transformers") or "").startswith("4.")
ATTENTION = {name: path for name, path in SEPARATE.items() if path.startswith("self_attn.")}
MIXTURE = "its MLP is a mixture of experts"
WHY_NOT = {"channels": MIXTURE, "kv_groups": "removing heads alone is not implemented for mixtures"}
ROUTED = {
    "num_experts_per_tok": count,
    "output_router_logits": truth,
    "router_aux_loss_coef": share,
}


def one(place: str, value: Any) -> None:
    """1: every layer has experts.

    Raises:
        ModelSourceError: It is something else.
    """
    if value != 1:
        raise problem(place, value, "1: layers without experts among others are not supported")


def none(place: str, value: Any) -> None:
    """An empty list: every layer has experts.

    Raises:
        ModelSourceError: It is something else.
    """
    if value:
        raise problem(place, value, "empty: layers without experts among others are not supported")


QWEN = {
    **ROUTED,
    "num_experts": count,
    "moe_intermediate_size": count,
    "norm_topk_prob": truth,
    "decoder_sparse_step": one,
    "mlp_only_layers": none,
    "use_sliding_window": only(False),
    # transformers 5 writes 0 for none.
    "sliding_window": optional(whole),
}
EXPERT = ("gate_proj", "up_proj", "down_proj")
MIXTRAL = Family(
    architecture="MixtralForCausalLM",
    model_type="mixtral",
    mlp=("mlp" if FUSES else "block_sparse_moe", "post_attention_layernorm"),
    projections=ATTENTION,
    units=("experts",),
    router="gate",
    no_fit=MIXTURE,
    why_not=WHY_NOT,
    window="all",
    fields={**ROUTED, "num_local_experts": count, "router_jitter_noise": share},
    experts=("w1", "w3", "w2") if FUSES else (),
    stored_mlp="block_sparse_moe",
    default_rope_base=1_000_000.0,
)
QWEN2_MOE = Family(
    architecture="Qwen2MoeForCausalLM",
    model_type="qwen2_moe",
    projections=ATTENTION,
    units=("experts",),
    router="gate",
    no_fit=MIXTURE,
    why_not=WHY_NOT,
    window="switched",
    fields={**QWEN, "shared_expert_intermediate_size": count, "qkv_bias": truth},
    own_head_dim=False,
    experts=EXPERT if FUSES else (),
    stored_mlp="mlp",
)
QWEN3_MOE = Family(
    architecture="Qwen3MoeForCausalLM",
    model_type="qwen3_moe",
    projections=ATTENTION,
    units=("experts",),
    router="gate",
    no_fit=MIXTURE,
    why_not=WHY_NOT,
    window="switched",
    fields={**QWEN, "num_local_experts": count},
    synonyms=(("num_experts", "num_local_experts"),),
    experts=EXPERT if FUSES else (),
    stored_mlp="mlp",
)
# Attention has a learned sink per head, which only the eager implementation computes.
GPT_OSS = Family(
    architecture="GptOssForCausalLM",
    model_type="gpt_oss",
    projections=ATTENTION,
    units=("experts",),
    router="router",
    no_fit=MIXTURE,
    why_not=WHY_NOT,
    window="by_kind",
    fields={
        **ROUTED,
        "num_local_experts": count,
        "experts_per_token": count,
        "initial_context_length": count,
        "swiglu_alpha": positive,
        "swiglu_limit": positive,
    },
    attentions=("eager",),
    default_head_dim=64,
    default_rope_base=150_000.0,
)
