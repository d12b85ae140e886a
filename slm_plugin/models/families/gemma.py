"""Gemma 2 and 3: a norm before and behind each block, two attention types, scaled embeddings.

A norm multiplies by 1 plus its weight.
"""

from __future__ import annotations

from slm_plugin.models.config_values import activation, count, optional, positive
from slm_plugin.models.families.family import Family

ATTENTION = ("self_attn", "input_layernorm", "post_attention_layernorm")
MLP = ("mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm")
FIELDS = {
    "hidden_activation": activation,
    "query_pre_attn_scalar": positive,
    "attn_logit_softcapping": optional(positive),
    "final_logit_softcapping": optional(positive),
    "sliding_window_pattern": count,
}
GEMMA2 = Family(
    architecture="Gemma2ForCausalLM",
    model_type="gemma2",
    attention=ATTENTION,
    mlp=MLP,
    residual="sandwich",
    window="by_kind",
    fields=FIELDS,
    reads=frozenset(FIELDS) - {"sliding_window_pattern"},
    even_split=True,
    default_head_dim=256,
    logits_softcap="final_logit_softcapping",
    gain_offset=1.0,
)
GEMMA3 = Family(
    architecture="Gemma3ForCausalLM",
    model_type="gemma3_text",
    config_class="Gemma3TextConfig",
    attention=ATTENTION,
    mlp=MLP,
    residual="sandwich",
    window="by_kind",
    fields={**FIELDS, "rope_local_base_freq": positive},
    reads=frozenset({*FIELDS, "rope_local_base_freq"}),
    even_split=True,
    rotary="by_kind",
    default_head_dim=256,
    default_rope_base=1_000_000.0,
    logits_softcap="final_logit_softcapping",
    gain_offset=1.0,
)
