"""BERT, Wav2Vec2, HuBERT, Wav2Vec2-Conformer, and the two stacks of Whisper.

A record holds for every class with a head, because dropping layers leaves heads as they are.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from slm_plugin.extras import found_version
from slm_plugin.models.config_values import count, only, optional, problem, share, token, truth
from slm_plugin.models.families.family import Family

# transformers 4.57 computes the positions of a conformer by one implementation alone.
FIVE = not (found_version("transformers") or "").startswith("4.")
DROPS_ONLY = "removing units is not implemented for encoders"


def absolute(place: str, value: Any) -> None:
    """Learned absolute positions: transformers 5 has no others, and does not look.

    Raises:
        ModelSourceError: It is something else.
    """
    if value != "absolute":
        raise problem(place, value, "absolute: transformers 5 computes no other positions")


def none(place: str, value: Any) -> None:
    """No adapters in the layers: their weights lie in further files, one set per language.

    Raises:
        ModelSourceError: There are some.
    """
    if value is not None:
        raise problem(place, value, "null: adapters of languages are not supported")


# With a weighted sum of what all layers put out, the class holds a weight for each of them.
COMMON = {"use_weighted_layer_sum": only(False), "is_decoder": only(False)}
SPEECH = {
    **COMMON,
    "adapter_attn_dim": none,
    "do_stable_layer_norm": truth,
    "hidden_dropout": share,
    "add_adapter": truth,
}
WHOLE_LAYERS: dict[str, Any] = {
    "units": (),
    "why_not": {"channels": DROPS_ONLY, "kv_groups": DROPS_ONLY},
    "no_fit": DROPS_ONLY,
    "projections": {},
    "own_head_dim": False,
    "rotary": "none",
}
BERT = Family(
    architecture="BertModel",
    model_type="bert",
    embedding="embeddings.word_embeddings",
    layers="encoder.layer",
    norm="",
    attention=("attention",),
    mlp=("intermediate", "output"),
    norms=("attention.output.LayerNorm", "output.LayerNorm"),
    residual="after",
    fields={
        **COMMON,
        "position_embedding_type": absolute,
        "hidden_dropout_prob": share,
        "attention_probs_dropout_prob": share,
        "type_vocab_size": count,
    },
    inputs=("input_ids", "attention_mask", "token_type_ids"),
    sees_all=True,
    passed={"use_cache": False},
    redundant=r"(bert\.)?(embeddings\.position_ids|pooler\..*)|cls\.seq_relationship\..*",
    **WHOLE_LAYERS,
)
WAV2VEC2 = Family(
    architecture="Wav2Vec2Model",
    model_type="wav2vec2",
    embedding="",
    layers="encoder.layers",
    norm="encoder.layer_norm",
    attention=("attention", "layer_norm"),
    mlp=("feed_forward", "final_layer_norm"),
    residual="after",
    pre_if="do_stable_layer_norm",
    fields=SPEECH,
    inputs=("input_values", "attention_mask"),
    frames="convolved",
    sees_all=True,
    trained_only=r"(.*\.)?masked_spec_embed",
    excluded="Wav2Vec2ForMaskedLM",
    **WHOLE_LAYERS,
)
HUBERT = replace(WAV2VEC2, architecture="HubertModel", model_type="hubert", excluded="")
CONFORMER = Family(
    architecture="Wav2Vec2ConformerModel",
    model_type="wav2vec2-conformer",
    embedding="",
    layers="encoder.layers",
    norm="encoder.layer_norm",
    attention=("self_attn", "self_attn_layer_norm"),
    mlp=("ffn1", "ffn2", "ffn1_layer_norm", "ffn2_layer_norm"),
    norms=("ffn1_layer_norm", "self_attn_layer_norm", "ffn2_layer_norm", "final_layer_norm"),
    residual="conformer",
    attentions=("sdpa", "eager") if FIVE else ("eager",),
    fields=SPEECH,
    inputs=("input_values", "attention_mask"),
    frames="convolved",
    sees_all=True,
    trained_only=r"(.*\.)?masked_spec_embed",
    **WHOLE_LAYERS,
)
WHISPER_FIELDS = {
    **COMMON,
    "encoder_layers": count,
    "decoder_layers": count,
    "encoder_attention_heads": count,
    "decoder_attention_heads": count,
    "encoder_ffn_dim": count,
    "decoder_ffn_dim": count,
    "num_mel_bins": count,
    "max_source_positions": count,
    "max_target_positions": count,
    "encoder_layerdrop": share,
    "decoder_layerdrop": share,
    "pad_token_id": optional(token),
}


def _whisper_names(stack: str) -> dict[str, str | None]:
    return {
        "hidden_size": "d_model",
        "hidden_act": "activation_function",
        "num_hidden_layers": f"{stack}_layers",
        "num_attention_heads": f"{stack}_attention_heads",
        "intermediate_size": f"{stack}_ffn_dim",
        "max_position_embeddings": "max_target_positions",
    }


WHISPER_ENCODER = Family(
    architecture="WhisperModel",
    model_type="whisper",
    stack="encoder",
    embedding="",
    names=_whisper_names("encoder"),
    layers="encoder.layers",
    norm="encoder.layer_norm",
    attention=("self_attn", "self_attn_layer_norm"),
    mlp=("fc2", "fc1", "final_layer_norm"),
    norms=("self_attn_layer_norm", "final_layer_norm"),
    fields=WHISPER_FIELDS,
    reads=frozenset({"is_encoder_decoder"}),
    inputs=("input_features", "attention_mask"),
    entry="encoder",
    frames="halved",
    sees_all=True,
    excluded="WhisperForCausalLM|WhisperForAudioClassification",
    **WHOLE_LAYERS,
)
WHISPER_DECODER = Family(
    architecture="WhisperModel",
    model_type="whisper",
    stack="decoder",
    embedding="decoder.embed_tokens",
    names=_whisper_names("decoder"),
    layers="decoder.layers",
    norm="decoder.layer_norm",
    attention=("self_attn", "encoder_attn", "self_attn_layer_norm", "encoder_attn_layer_norm"),
    mlp=("fc2", "fc1", "final_layer_norm"),
    norms=("self_attn_layer_norm", "encoder_attn_layer_norm", "final_layer_norm"),
    fields=WHISPER_FIELDS,
    reads=frozenset({"is_encoder_decoder"}),
    inputs=("decoder_input_ids", "decoder_attention_mask", "input_features", "attention_mask"),
    passed={"use_cache": False},
    excluded="WhisperForCausalLM|WhisperForAudioClassification",
    **WHOLE_LAYERS,
)
ENCODERS = (BERT, WAV2VEC2, CONFORMER, HUBERT, WHISPER_ENCODER, WHISPER_DECODER)
