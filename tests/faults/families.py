"""Wrong records of families, and the module that has to catch each."""

from __future__ import annotations

from tests.faults import Fault

MATRIX = "models/families/test_matrix.py"
TOWERS = "models/families/test_towers.py"
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
    Fault(
        "any layer of Qwen3-VL may go, those with added features of images among them",
        "models/families/towers.py",
        """        deepstack="deepstack_visual_indexes",
""",
        "",
        TOWERS,
    ),
    Fault(
        "a plan may name a layer that must stay",
        "plans/check.py",
        "    check_fixed(by_kind(plan.operations)[0], plan.before)\n",
        "",
        TOWERS,
    ),
    Fault(
        "the logits of Gemma 3 with images are said to be bounded",
        "models/families/towers.py",
        'reads=GEMMA3.reads - {"final_logit_softcapping"}',
        "reads=GEMMA3.reads",
        TOWERS,
    ),
    Fault(
        "the sections of three positions are lost",
        "models/rope.py",
        "    return found, {SECTION: next(iter(stated.values())), INTERLEAVED: True}",
        "    return found, {SECTION: DEFAULT_SECTION, INTERLEAVED: True}",
        TOWERS,
    ),
    Fault(
        "adapters are put into the vision model as well",
        "recovery/training/lora.py",
        "    if family.tower is None:",
        "    if True:",
        TOWERS,
    ),
    Fault(
        "whether the head is the embedding is written in one place",
        "export/portable_json.py",
        'config["tie_word_embeddings"] = decoder["tie_word_embeddings"] = tied',
        'decoder["tie_word_embeddings"] = tied',
        TOWERS,
    ),
    Fault(
        "files of the processor are not written",
        "export/checkpoint.py",
        "    save_processor(model, folder)\n",
        "",
        TOWERS,
    ),
)
