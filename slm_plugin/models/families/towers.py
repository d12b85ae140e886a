"""Models of images and text, whose text decoder is pruned; what sees images stays whole."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from slm_plugin.models.config_values import activation, count, problem, truth, whole
from slm_plugin.models.families.family import Tower
from slm_plugin.models.families.gemma import GEMMA3
from slm_plugin.models.families.llama import LLAMA, QWEN3

DECODER = "model.language_model"
# Names in checkpoints are those of the first release; transformers still writes them.
STORED = (
    ("language_model.model.", f"{DECODER}."),
    ("language_model.lm_head.", "lm_head."),
    ("vision_tower.", "model.vision_tower."),
    ("multi_modal_projector.", "model.multi_modal_projector."),
)


def _strategy(place: str, value: Any) -> None:
    """Which features of the vision model are read.

    Raises:
        ModelSourceError: It is something else.
    """
    if value not in ("default", "full"):
        raise problem(place, value, "default or full")


def _feature_layers(place: str, value: Any) -> None:
    """One layer of the vision model, counted from either end, or several.

    Raises:
        ModelSourceError: It is something else.
    """
    for one in value if isinstance(value, list) and value else [value]:
        if isinstance(one, bool) or not isinstance(one, int):
            raise problem(place, value, "a whole number or a list of them")


GEMMA3_TOWER = replace(
    GEMMA3,
    architecture="Gemma3ForConditionalGeneration",
    model_type="gemma3",
    config_class="Gemma3Config",
    decoder=DECODER,
    # Unlike the class for text alone, this one has no bound of the logits.
    reads=GEMMA3.reads - {"final_logit_softcapping"},
    logits_softcap=None,
    tower=Tower(
        text="gemma3_text",
        text_class="Gemma3TextConfig",
        vision=("siglip_vision_model",),
        defaults={
            "vocab_size": 262_208,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
        },
        tied=True,
        fields={
            "mm_tokens_per_image": count,
            "image_token_index": whole,
            "boi_token_index": whole,
            "eoi_token_index": whole,
        },
        stored=STORED,
        nested_vision=True,
    ),
)
QWEN3_VL = replace(
    QWEN3,
    architecture="Qwen3VLForConditionalGeneration",
    model_type="qwen3_vl",
    config_class="Qwen3VLConfig",
    hidden_channels=False,
    decoder=DECODER,
    window="none",
    rotary="mrope",
    # The two releases have two defaults.
    default_rope_base=None,
    tower=Tower(
        text="qwen3_vl_text",
        text_class="Qwen3VLTextConfig",
        # transformers 4.57 writes the one name, 5 the other.
        vision=("qwen3_vl", "qwen3_vl_vision"),
        fields={
            "image_token_id": whole,
            "video_token_id": whole,
            "vision_start_token_id": whole,
            "vision_end_token_id": whole,
        },
        deepstack="deepstack_visual_indexes",
    ),
)
LLAVA = replace(
    LLAMA,
    architecture="LlavaForConditionalGeneration",
    model_type="llava",
    config_class="LlavaConfig",
    hidden_channels=False,
    decoder=DECODER,
    tower=Tower(
        text="llama",
        text_class="LlamaConfig",
        vision=("clip_vision_model", "siglip_vision_model"),
        defaults={
            "vocab_size": 32_000,
            "hidden_size": 4096,
            "intermediate_size": 11_008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        },
        fields={
            "image_token_index": whole,
            "image_seq_length": count,
            "projector_hidden_act": activation,
            "multimodal_projector_bias": truth,
            "vision_feature_select_strategy": _strategy,
            "vision_feature_layer": _feature_layers,
        },
        stored=STORED,
        nested_vision=True,
    ),
)
