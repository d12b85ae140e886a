"""Positions and windows that an ONNX graph gets right or not, known before hours of work."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_plugin.errors import SlmError, UnsupportedModelError
from slm_plugin.export.lengths import STATIC_ROPE, affordable, rope_types, windows
from slm_plugin.lazy import torch
from slm_plugin.progress import say

if TYPE_CHECKING:
    from slm_plugin.export.base import Exporter
    from slm_plugin.session import Session

VOCABULARY = 128
WINDOW = 8
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "sliding_window": WINDOW,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def refuse_length_dependent(config: Any) -> None:
    """A graph holds one set of frequencies: that of the short text that it is traced on.

    Raises:
        UnsupportedModelError: The model has others for long texts, or may have them.
    """
    other = sorted(rope_types(config) - set(STATIC_ROPE))
    if other:
        raise UnsupportedModelError(
            f"the model's rotary scaling is {', '.join(other)}, which depends on the length of "
            "the text; an ONNX graph would be wrong on long ones",
            hint=f"leave `onnx` out, or use a model whose scaling is {', '.join(STATIC_ROPE)}",
        )


def unproved_windows(config: Any, vocabulary: int) -> set[int]:
    """Sliding windows that no prompt of the checks goes beyond."""
    return {window for window in windows(config) if not affordable(window, vocabulary)}


def rehearse(session: Session, folder: Path, exporter: Exporter) -> None:
    """Export and verify a tiny model of the same class whose window is short.

    The window is a constant of the graph: where a short one is honoured, so is a long one.

    Args:
        session: Holds the model that is going to be exported.
        folder: An empty folder.
        exporter: Writes the graph and verifies it.

    Raises:
        UnsupportedModelError: Windows are not honoured, or the class cannot be exported at all.
    """
    say(f"{exporter.name}: a tiny model of this class shows whether its sliding window is honoured")
    try:
        exporter.export(type(session)(stand_in(session.model)), folder)
    except SlmError as error:
        raise UnsupportedModelError(
            f"{type(session.model).__name__} with a sliding window cannot be exported to ONNX "
            f"here: {error}",
            hint=f"leave `{exporter.name}` out",
        ) from error


def stand_in(model: Any) -> Any:
    """A random model of the same class: two layers, a short window, everything else small."""
    config = copy.deepcopy(model.config)
    config.__dict__.pop("quantization_config", None)
    for name, value in SIZES.items():
        setattr(config, name, value)
    config.num_hidden_layers = 2
    kinds = getattr(config, "layer_types", None)
    if kinds:
        config.layer_types = ["sliding_attention", "full_attention"]
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        made = type(model)(config).float().eval()
        for parameter in made.parameters():
            # As large as it takes for attention to matter.
            if parameter.dim() > 1:
                parameter.normal_(0, 0.15)
    return made
