"""OLMo 2 and 3: a norm behind each block and none before it; query and key norms over all heads."""

from __future__ import annotations

from slm_plugin.models.families.family import Family

ATTENTION = ("self_attn", "post_attention_layernorm")
MLP = ("mlp", "post_feedforward_layernorm")
WHY_NOT = {"kv_groups": "its query and key norms run over all heads, so heads are not independent"}
OLMO2 = Family(
    architecture="Olmo2ForCausalLM",
    model_type="olmo2",
    attention=ATTENTION,
    mlp=MLP,
    residual="post",
    units=("channels",),
    why_not=WHY_NOT,
)
# Only layers with full attention take the scaling of rotary frequencies.
OLMO3 = Family(
    architecture="Olmo3ForCausalLM",
    model_type="olmo3",
    attention=ATTENTION,
    mlp=MLP,
    residual="post",
    units=("channels",),
    why_not=WHY_NOT,
    window="by_kind",
    rotary="by_kind",
    default_rope_base=None,
)
