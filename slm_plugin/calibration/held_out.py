"""The held-out samples, on which a repair is evaluated."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# One sample in this many is held out, starting with the first.
EVERY = 5


def is_held_out(numbers: Tensor) -> Tensor:
    """Whether each sample is held out, by its index in the calibration set."""
    return numbers % EVERY == 0
