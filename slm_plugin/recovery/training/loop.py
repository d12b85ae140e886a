"""Shared by all recoveries that train: batches, learning-rate schedule, loss check."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from slm_plugin.errors import NumericalError
from slm_plugin.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def shuffled(items: Tensor, batch_size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """One epoch: all items, along the first axis, in batches and in a random order."""
    order = torch.randperm(len(items), generator=generator)
    yield from torch.split(items[order], batch_size)


def warmup_cosine(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float, lowest: float = 0.0
) -> torch.optim.lr_scheduler.LRScheduler:
    """Learning-rate schedule: linear warm-up and cosine decay.

    Args:
        optimizer: Has one group, whose rate is the peak.
        steps: Number of training steps.
        warmup: Share of the steps that is warm-up.
        lowest: The rate at the end.
    """
    warm = max(1, round(warmup * steps))
    schedules = torch.optim.lr_scheduler
    return schedules.SequentialLR(
        optimizer,
        [
            schedules.LinearLR(optimizer, 1 / (warm + 1), total_iters=warm),
            schedules.CosineAnnealingLR(optimizer, max(1, steps - warm), lowest),
        ],
        milestones=[warm],
    )


def refuse_non_finite(loss: Tensor, name: str) -> None:
    """Stop a training that diverged.

    Args:
        loss: The loss, one number.
        name: The recovery.

    Raises:
        NumericalError: It is NaN or infinite.
    """
    if not torch.isfinite(loss):
        raise NumericalError(
            f"the training loss of {name} is NaN or infinite",
            hint="lower learning_rate, or load the model in float32 or bfloat16",
        )
