"""StableLM and Phi-3."""

from __future__ import annotations

from slm_plugin.models.config_values import positive, share, truth
from slm_plugin.models.families.family import Family

# LayerNorm; positions turn a part of each head; the larger models compute both blocks in parallel.
STABLELM = Family(
    architecture="StableLmForCausalLM",
    model_type="stablelm",
    parallel_if=("use_parallel_residual",),
    units=("channels",),
    why_not={"kv_groups": "its class computes the length of a head from the number of heads"},
    own_head_dim=False,
    fields={
        "layer_norm_eps": positive,
        "use_qkv_bias": truth,
        "qk_layernorm": truth,
        "use_parallel_residual": truth,
        "hidden_dropout": share,
    },
    reads=frozenset({"qk_layernorm", "use_parallel_residual"}),
    partial_rotary=0.25,
)
PHI3 = Family(
    architecture="Phi3ForCausalLM",
    model_type="phi3",
    projections={
        "qkv_proj": "self_attn.qkv_proj",
        "o_proj": "self_attn.o_proj",
        "gate_up_proj": "mlp.gate_up_proj",
        "down_proj": "mlp.down_proj",
    },
    fused={
        "qkv_proj": ("q_proj", "k_proj", "v_proj"),
        "gate_up_proj": ("gate_proj", "up_proj"),
    },
    window="all",
    fields={"resid_pdrop": share, "embd_pdrop": share},
    rotary="phi3",
    partial_rotary=1.0,
    hidden_channels=True,
)
