"""GPT-NeoX (Pythia), OPT, GPT-2 and Falcon: LayerNorm, MLPs without a gate, names of their own.

GPT-NeoX and Falcon hold queries, keys and values in one matrix, head by head.
"""

from __future__ import annotations

from slm_plugin.models.config_values import count, only, optional, positive, share, truth
from slm_plugin.models.families.family import Family

NO_GATE = "removing units is not implemented for its MLP, which has no gate"
FUSED = "removing heads is not implemented for queries, keys and values in one matrix"


GPT_NEOX = Family(
    architecture="GPTNeoXForCausalLM",
    model_type="gpt_neox",
    decoder="gpt_neox",
    embedding="embed_in",
    heads=("embed_out", "lm_head"),
    norm="final_layer_norm",
    attention=("attention", "input_layernorm"),
    projections={
        "qkv_proj": "attention.query_key_value",
        "o_proj": "attention.dense",
        "up_proj": "mlp.dense_h_to_4h",
        "down_proj": "mlp.dense_4h_to_h",
    },
    parallel_if=("use_parallel_residual",),
    parallel_default=True,
    units=(),
    why_not={"channels": NO_GATE, "kv_groups": FUSED},
    fields={
        "rotary_pct": positive,
        "rotary_emb_base": positive,
        "layer_norm_eps": positive,
        "hidden_dropout": share,
        "classifier_dropout": share,
        "use_parallel_residual": truth,
    },
    reads=frozenset({"use_parallel_residual"}),
    own_head_dim=False,
    redundant=r"gpt_neox\.layers\.[0-9]+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    rotary="neox",
    partial_rotary=0.25,
)
OPT = Family(
    architecture="OPTForCausalLM",
    model_type="opt",
    decoder="model.decoder",
    names={"intermediate_size": "ffn_dim", "hidden_act": "activation_function"},
    norm="final_layer_norm",
    attention=("self_attn", "self_attn_layer_norm"),
    mlp=("fc2", "fc1", "final_layer_norm"),
    norms=("self_attn_layer_norm", "final_layer_norm"),
    projections={
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "o_proj": "self_attn.out_proj",
        "up_proj": "fc1",
        "down_proj": "fc2",
    },
    units=(),
    why_not={"channels": NO_GATE, "kv_groups": NO_GATE},
    fields={
        "do_layer_norm_before": only(True),
        "_remove_final_layer_norm": only(False),
        "enable_bias": truth,
        "layer_norm_elementwise_affine": truth,
        "word_embed_proj_dim": count,
        "dropout": share,
        "layerdrop": share,
    },
    own_head_dim=False,
    rotary="none",
)
GPT2 = Family(
    architecture="GPT2LMHeadModel",
    model_type="gpt2",
    config_class="GPT2Config",
    decoder="transformer",
    embedding="wte",
    headless=True,
    names={
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "max_position_embeddings": "n_positions",
        "intermediate_size": None,
        "hidden_act": "activation_function",
    },
    layers="h",
    norm="ln_f",
    attention=("attn", "ln_1"),
    mlp=("mlp", "ln_2"),
    projections={},
    units=(),
    no_fit="its projections are no linear maps of PyTorch",
    why_not={"channels": NO_GATE, "kv_groups": FUSED},
    fields={
        "n_inner": optional(count),
        "layer_norm_epsilon": positive,
        "scale_attn_weights": truth,
        "scale_attn_by_inverse_layer_idx": only(False),
        "reorder_and_upcast_attn": truth,
        "resid_pdrop": share,
        "embd_pdrop": share,
        "attn_pdrop": share,
    },
    own_head_dim=False,
    redundant=r"transformer\.h\.[0-9]+\.attn\.(bias|masked_bias)",
    rotary="none",
)
FALCON = Family(
    architecture="FalconForCausalLM",
    model_type="falcon",
    decoder="transformer",
    embedding="word_embeddings",
    names={
        "intermediate_size": None,
        "hidden_act": "activation",
        "num_key_value_heads": "num_kv_heads",
    },
    layers="h",
    norm="ln_f",
    attention=("self_attention", "input_layernorm"),
    norms=("input_layernorm", "post_attention_layernorm", "ln_attn", "ln_mlp"),
    projections={
        "qkv_proj": "self_attention.query_key_value",
        "o_proj": "self_attention.dense",
        "up_proj": "mlp.dense_h_to_4h",
        "down_proj": "mlp.dense_4h_to_h",
    },
    parallel_if=("parallel_attn", "new_decoder_architecture"),
    parallel_default=True,
    units=(),
    why_not={"channels": NO_GATE, "kv_groups": FUSED},
    fields={
        "ffn_hidden_size": count,
        "layer_norm_epsilon": positive,
        "alibi": truth,
        "bias": truth,
        "multi_query": truth,
        "parallel_attn": truth,
        "new_decoder_architecture": truth,
        "num_ln_in_parallel_attn": optional(count),
        "hidden_dropout": share,
    },
    reads=frozenset({"alibi", "parallel_attn"}),
    own_head_dim=False,
)
