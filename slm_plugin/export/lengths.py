"""Lengths at which a model's positions or masks change, and what can be said beyond them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Frequencies of these are worked out once, whatever the length of the text.
STATIC_ROPE = ("default", "linear", "llama3", "yarn")
# A prompt goes so many tokens beyond a length, and is read only when it stays within both bounds:
# logits of 64 million take 256 MB.
BEYOND = 32
LONGEST = 512
MOST_LOGITS = 64_000_000


def rope_types(config: Any) -> set[str]:
    """Kinds of rotary scaling; one for each kind of layer where they differ."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    return {str(one.get("rope_type", one.get("type", "default"))) for one in _settings(settings)}


def depends_on_length(config: Any) -> bool:
    """Whether a token's rotation depends on how long the text is, as with dynamic scaling."""
    return bool(rope_types(config) - set(STATIC_ROPE))


def windows(config: Any) -> set[int]:
    """Lengths of sliding windows that some layer has."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    used = kinds is None or "sliding_attention" in kinds
    if not used or not getattr(config, "use_sliding_window", True):
        return set()
    return set(_lengths(window))


def boundaries(config: Any) -> set[int]:
    """Lengths of text at which something changes: windows, and the positions of training."""
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    original = (one.get("original_max_position_embeddings") for one in _settings(settings))
    named = (
        getattr(config, name, None)
        for name in ("max_position_embeddings", "original_max_position_embeddings")
    )
    return windows(config) | set(_lengths(*named, *original))


def affordable(boundary: int, vocabulary: int) -> bool:
    """Whether a prompt that goes beyond a length can be read in every check."""
    return boundary <= LONGEST and (boundary + BEYOND) * vocabulary <= MOST_LOGITS


def probe_length(config: Any, vocabulary: int) -> int | None:
    """Tokens of a prompt that goes beyond as many boundaries as can be afforded."""
    reached = [b for b in boundaries(config) if affordable(b, vocabulary)]
    return max(reached) + BEYOND if reached else None


def _settings(settings: Any) -> Iterator[Mapping[str, Any]]:
    """The rotary settings, or those of each kind of layer."""
    if isinstance(settings, Mapping):
        nested = [one for one in settings.values() if isinstance(one, Mapping)]
        yield from nested or [settings]


def _lengths(*found: Any) -> Iterator[int]:
    # Some configs hold lengths as 32768.0.
    yield from (int(n) for n in found if isinstance(n, int | float) and n >= 1)
