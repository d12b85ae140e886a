"""From relative sparsities to the exact number of channels that each layer keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Halvings of an interval of floating-point numbers until its ends are neighbours.
_HALVINGS = 100
# A layer that should lose nothing loses channels last, when all others are at their floor.
_LEAST = 1e-9


@dataclass(frozen=True, slots=True)
class Limits:
    """What a stage leaves of the MLP channels.

    Attributes:
        widths: Channels of every layer before the stage.
        floors: Fewest channels that each layer keeps, multiples of ``multiple_of``.
        kept: Channels that all layers keep together, a multiple of ``multiple_of``, from the sum of
            the floors to the sum of the `ceilings`.
        multiple_of: Every layer keeps a multiple of this.
    """

    widths: tuple[int, ...]
    floors: tuple[int, ...]
    kept: int
    multiple_of: int

    @property
    def ceilings(self) -> tuple[int, ...]:
        """Most channels that each layer keeps."""
        return tuple(width - width % self.multiple_of for width in self.widths)

    @property
    def sparsity(self) -> float:
        """Share of all channels that goes."""
        return 1 - self.kept / sum(self.widths)


def kept_channels(relative: Sequence[float], limits: Limits) -> tuple[int, ...]:
    """Channels that each layer keeps: exactly ``limits.kept`` together.

    Layer l should keep ``widths_l * (1 - eta * relative_l)`` channels, held between its floor and
    its ceiling. Bisection finds the ``eta`` that gives the sum. The counts are rounded down to
    multiples, and the steps that are then missing go to the layers with the largest remainders,
    the lowest layer first. No other counts with this sum and these bounds come nearer to the ideal
    ones, and a layer that should lose a larger share never keeps a larger one of two equal widths.

    Args:
        relative: Relative sparsity of every layer; what is below 0 counts as 0.
        limits: Bounds and sum.
    """
    step = limits.multiple_of
    ideal = ideal_channels(relative, limits)
    counts = [step * math.floor(count / step + _LEAST) for count in ideal]
    missing = (limits.kept - sum(counts)) // step
    growing = [i for i, most in enumerate(limits.ceilings) if counts[i] + step <= most]
    growing.sort(key=lambda i: counts[i] - ideal[i])
    for layer in growing[:missing]:
        counts[layer] += step
    return tuple(counts)


def ideal_channels(relative: Sequence[float], limits: Limits) -> list[float]:
    """What `kept_channels` rounds."""
    largest = max(relative)
    if largest <= 0:
        relative, largest = [1.0] * len(relative), 1.0
    shares = [max(share / largest, _LEAST) for share in relative]
    bounds = list(zip(limits.widths, limits.floors, limits.ceilings, shares, strict=True))

    def counts(eta: float) -> list[float]:
        return [
            min(max(width * (1 - eta * share), floor), ceiling)
            for width, floor, ceiling, share in bounds
        ]

    # At the upper end every layer is at its floor.
    low, high = 0.0, 1 / _LEAST
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if sum(counts(middle)) > limits.kept:
            low = middle
        else:
            high = middle
    return counts(high)
