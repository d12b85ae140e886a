"""What every recovery that trains does alike: its order, its rate, and what it refuses."""

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


def rise_and_fall(
    optimizer: torch.optim.Optimizer, steps: int, warmup: float, lowest: float = 0.0
) -> torch.optim.lr_scheduler.LRScheduler:
    """A learning rate that rises along a line to its peak and falls along half a cosine.

    Args:
        optimizer: Of one group, whose rate is the peak.
        steps: Steps of the whole training.
        warmup: Share of them in which the rate rises.
        lowest: The rate at the end.
    """
    rises = max(1, round(warmup * steps))
    schedules = torch.optim.lr_scheduler
    return schedules.SequentialLR(
        optimizer,
        [
            schedules.LinearLR(optimizer, 1 / (rises + 1), total_iters=rises),
            schedules.CosineAnnealingLR(optimizer, max(1, steps - rises), lowest),
        ],
        milestones=[rises],
    )


def refuse_non_finite(loss: Tensor, name: str) -> None:
    """Stop a training that has gone astray.

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
