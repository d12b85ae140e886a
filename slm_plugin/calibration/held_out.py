"""The held-out samples, on which a repair is evaluated."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from slm_plugin.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

# One sample in this many is held out, starting with the first.
EVERY = 5


def is_held_out(numbers: Tensor) -> Tensor:
    """Whether each sample is held out, by its index in the calibration set."""
    return numbers % EVERY == 0


def held_out_count(samples: int) -> int:
    """How many of so many samples are held out."""
    return len(range(0, samples, EVERY))


def held_out_rows(batches: Iterable[Tensor]) -> Iterator[tuple[Tensor, list[int]]]:
    """Every batch of the calibration set with the places of its held-out samples.

    Args:
        batches: A tensor for every batch, ``(samples, ...)``.
    """
    start = 0
    for batch in batches:
        chosen = is_held_out(torch.arange(start, start + len(batch)))
        start += len(batch)
        yield batch, chosen.nonzero().flatten().tolist()


def held_out(batches: Iterable[Tensor]) -> Iterator[Tensor]:
    """The held-out samples of every batch that has some.

    Args:
        batches: A tensor for every batch of the calibration set, ``(samples, ...)``.
    """
    return (batch[rows] for batch, rows in held_out_rows(batches) if rows)
