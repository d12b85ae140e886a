"""Values of layers on the scale from 0 to 1."""

from __future__ import annotations

from collections.abc import Sequence


def scaled(values: Sequence[float]) -> list[float]:
    """The values moved and stretched to 0..1 (min-max); all 0.5 where they are equal."""
    low, high = min(values), max(values)
    if high <= low:
        return [0.5] * len(values)
    return [(value - low) / (high - low) for value in values]
