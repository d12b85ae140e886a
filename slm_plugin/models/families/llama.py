"""Llama and its closest relatives: pre-norm, separate projections, RMSNorm."""

from __future__ import annotations

from slm_plugin.models.config_values import count, flags, positive
from slm_plugin.models.families.family import Family

LLAMA = Family(
    architecture="LlamaForCausalLM", model_type="llama", even_split=True, hidden_channels=True
)
MISTRAL = Family(
    architecture="MistralForCausalLM", model_type="mistral", window="all", hidden_channels=True
)
QWEN2 = Family(
    architecture="Qwen2ForCausalLM", model_type="qwen2", window="switched", hidden_channels=True
)
QWEN3 = Family(
    architecture="Qwen3ForCausalLM",
    model_type="qwen3",
    window="switched",
    default_head_dim=128,
    hidden_channels=True,
)
# Every few layers have no positions, so two layers may differ although both have full attention.
SMOLLM3 = Family(
    architecture="SmolLM3ForCausalLM",
    model_type="smollm3",
    window="switched",
    kind_fields=("no_rope_layers",),
    fields={"no_rope_layers": flags, "no_rope_layer_interval": count},
    reads=frozenset({"no_rope_layers"}),
    default_rope_base=2_000_000.0,
    hidden_channels=True,
)
GRANITE = Family(
    architecture="GraniteForCausalLM",
    model_type="granite",
    fields={
        "embedding_multiplier": positive,
        "residual_multiplier": positive,
        "attention_multiplier": positive,
        "logits_scaling": positive,
    },
    reads=frozenset(
        {"embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"}
    ),
    residual_multiplier="residual_multiplier",
    logits_divisor="logits_scaling",
    hidden_channels=True,
)
