"""Tiny random encoders of every family, and calibration tensors with padding to go with them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedModel

from slm_plugin.models.families import encoders
from slm_plugin.models.families.family import Family

LAYERS = 5
_SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "vocab_size": 40}
_WAVE = {
    **_SIZES,
    "num_hidden_layers": LAYERS,
    "conv_dim": [12, 12],
    "conv_kernel": [8, 4],
    "conv_stride": [4, 2],
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 6,
    "num_conv_pos_embedding_groups": 4,
    "feat_extract_norm": "layer",
    # Large, so that masking or dropping layers at random would show.
    "layerdrop": 0.9,
    "mask_time_prob": 0.6,
    "mask_time_length": 2,
    "hidden_dropout": 0.3,
    "codevector_dim": 8,
    "proj_codevector_dim": 8,
    "num_codevectors_per_group": 4,
    "classifier_proj_size": 16,
}
_WHISPER = {
    "d_model": 32,
    "vocab_size": 40,
    "encoder_layers": LAYERS,
    "decoder_layers": LAYERS - 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 40,
    "num_mel_bins": 8,
    "max_source_positions": 12,
    "max_target_positions": 40,
    "encoder_layerdrop": 0.9,
    "decoder_layerdrop": 0.9,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 2,
    "decoder_start_token_id": 3,
    "begin_suppress_tokens": [4],
}
# A short name: the record, the head, and what the config has.
ENCODERS: dict[str, tuple[Family, str, dict[str, Any]]] = {
    "bert": (
        encoders.BERT,
        "BertForMaskedLM",
        {**_SIZES, "num_hidden_layers": LAYERS, "max_position_embeddings": 64},
    ),
    "wav2vec2": (encoders.WAV2VEC2, "Wav2Vec2ForCTC", _WAVE),
    "wav2vec2_stable": (
        encoders.WAV2VEC2,
        "Wav2Vec2ForCTC",
        {**_WAVE, "do_stable_layer_norm": True},
    ),
    "hubert": (encoders.HUBERT, "HubertForCTC", _WAVE),
    "hubert_stable": (
        encoders.HUBERT,
        "HubertForCTC",
        {**_WAVE, "do_stable_layer_norm": True},
    ),
    "conformer": (
        encoders.CONFORMER,
        "Wav2Vec2ConformerForCTC",
        {**_WAVE, "position_embeddings_type": "relative", "conv_depthwise_kernel_size": 5},
    ),
    "conformer_rotary": (
        encoders.CONFORMER,
        "Wav2Vec2ConformerForCTC",
        {**_WAVE, "position_embeddings_type": "rotary", "conv_depthwise_kernel_size": 5},
    ),
    "whisper_encoder": (
        encoders.WHISPER_ENCODER,
        "WhisperForConditionalGeneration",
        _WHISPER,
    ),
    "whisper_decoder": (
        encoders.WHISPER_DECODER,
        "WhisperForConditionalGeneration",
        _WHISPER,
    ),
}


def make_encoder(
    name: str, head: str | None = None, *, seed: int = 0, **overrides: Any
) -> PreTrainedModel:
    """A tiny random model in training mode, as a class leaves it, whose every layer matters."""
    _, usual, settings = ENCODERS[name]
    made = getattr(transformers, head or usual)
    torch.manual_seed(seed)
    model: PreTrainedModel = made(made.config_class(**{**settings, **overrides}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for place, parameter in model.named_parameters():
            if "norm" in place.lower() and place.endswith("weight"):
                parameter.uniform_(0.5, 1.5, generator=generator)
            elif "parametrizations" not in place:
                parameter.normal_(0, 0.15, generator=generator)
    return model.train()


def stack_of(name: str) -> str | None:
    """The stack to name, where the model has two."""
    return ENCODERS[name][0].stack or None


def make_inputs(
    name: str, lengths: tuple[int, ...] = (23, 12, 17), padded: int = 24, *, seed: int = 5
) -> dict[str, torch.Tensor]:
    """Tensors as a processor gives them: samples of some lengths in frames, padded to another.

    What is sound or text does not depend on the padding, and what is padding is noise.
    """
    generator = torch.Generator().manual_seed(seed)
    noise = torch.Generator().manual_seed(seed + padded)
    if name == "bert":
        return _tokens("", lengths, padded, generator, noise)
    if name.startswith("whisper"):
        # Whisper has no mask of sound: what is padding reaches all frames.
        features = _padded((8,), [*lengths], 24, generator, torch.Generator().manual_seed(seed))
        ones = _mask(lengths, 24)
        found = {"input_features": features, "attention_mask": ones}
        if name == "whisper_decoder":
            found |= _tokens("decoder_", lengths, padded, generator, noise)
            del found["attention_mask"]
        return found
    # Two convolutions: 8 values a frame, and 12 more for the last one.
    samples = [8 * length + 12 for length in lengths]
    values = _padded((), samples, 8 * padded + 12, generator, noise)
    return {"input_values": values, "attention_mask": _mask(samples, 8 * padded + 12)}


def _mask(lengths: Any, padded: int) -> torch.Tensor:
    return (torch.arange(padded) < torch.tensor(lengths)[:, None]).long()


def _padded(
    inner: tuple[int, ...],
    lengths: list[int],
    padded: int,
    generator: torch.Generator,
    noise: torch.Generator,
) -> torch.Tensor:
    found = torch.randn((len(lengths), *inner, padded), generator=noise)
    for number, length in enumerate(lengths):
        found[number, ..., :length] = torch.randn((*inner, length), generator=generator)
    return found


def _tokens(
    prefix: str,
    lengths: tuple[int, ...],
    padded: int,
    generator: torch.Generator,
    noise: torch.Generator,
) -> dict[str, torch.Tensor]:
    ids = torch.randint(5, 40, (len(lengths), padded), generator=noise)
    for number, length in enumerate(lengths):
        ids[number, :length] = torch.randint(5, 40, (length,), generator=generator)
    return {f"{prefix}input_ids": ids, f"{prefix}attention_mask": _mask(lengths, padded)}
