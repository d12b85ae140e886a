"""Wrong records of families, and the module that has to catch each."""

from __future__ import annotations

from tests.faults import Fault

MATRIX = "models/families/test_matrix.py"
FAULTS = (
    Fault(
        "Gemma 2's MLP is said to be added to the stream as it is",
        "models/families/gemma.py",
        """    residual="sandwich",
    window="by_kind",
    fields=FIELDS,""",
        """    residual="pre",
    window="by_kind",
    fields=FIELDS,""",
        MATRIX,
    ),
    Fault(
        "SmolLM3's layers without positions are said to be like the others",
        "models/families/llama.py",
        """    kind_fields=("no_rope_layers",),
""",
        "",
        MATRIX,
    ),
    Fault(
        "Granite's logits are not divided",
        "models/families/llama.py",
        """    logits_divisor="logits_scaling",
""",
        "",
        MATRIX,
    ),
    Fault(
        "Gemma 3's logits would be bounded by another field",
        "models/families/gemma.py",
        """    rotary="by_kind",
    default_head_dim=256,
    default_rope_base=1_000_000.0,
    logits_softcap="final_logit_softcapping",
""",
        """    rotary="by_kind",
    default_head_dim=256,
    default_rope_base=1_000_000.0,
    logits_softcap="query_pre_attn_scalar",
""",
        MATRIX,
    ),
    Fault(
        "queries, keys and values in one matrix are counted as three equal parts",
        "models/view.py",
        '(modules["qkv_proj"].out_features // head_dim - heads) // 2',
        '(modules["qkv_proj"].out_features // head_dim) // 3',
        MATRIX,
    ),
    Fault(
        "a norm behind the MLP is said to stand before it",
        "models/families/olmo.py",
        'MLP = ("mlp", "post_feedforward_layernorm")',
        'MLP = ("mlp", "post_attention_layernorm")',
        MATRIX,
    ),
)
