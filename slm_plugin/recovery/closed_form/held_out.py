"""Samples that judge a repair and take no part in it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

# Every so many samples one is held out, the first among them.
EVERY = 5


def is_held_out(numbers: Tensor) -> Tensor:
    """Which samples are held out, given by their numbers in the calibration set."""
    return numbers % EVERY == 0
