"""Policy gradient: learn how probably each unit stays, from losses of randomly masked models alone.

Each unit u has a probability theta_u; its mask m_u is 1 with that probability, else 0. The expected
loss ``E[L(m)]`` is minimised subject to ``sum(theta) = number of units that stay`` in every part,
here in every layer. By the score function its gradient is ``E[L(m) d log P(m) / d theta]``, which
needs forward passes alone.

Source: Bypass Back-propagation, ACL 2025 (arXiv 2406.10576), and its released code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from slm_plugin.lazy import torch
from slm_plugin.progress import track

if TYPE_CHECKING:
    from torch import Tensor

Estimator = Literal["unbiased", "released"]

# Masks that are drawn for each step, all evaluated on the same data (K of the paper).
DRAWS = 2
# Steps over which the released code's moving average of the losses goes (T of the paper).
AVERAGED = 5
# Added to a probability and to its complement by the released code.
EPSILON = 1e-7

# The loss of one masked model, from the step, the number of the draw and the mask, ``(units,)``.
Loss = Callable[[int, int, "Tensor"], float]


@dataclass(frozen=True, slots=True)
class Descent:
    """How the probabilities are learned.

    Attributes:
        steps: Number of steps.
        learning_rate: Rate of the first step; a cosine takes it to 0.
        estimator: How the gradient is estimated; see `gradient`.
        seed: Seed of the masks.
    """

    steps: int
    learning_rate: float
    estimator: Estimator
    seed: int


def learn(
    start: Tensor,
    sizes: Sequence[int],
    keep: Sequence[int],
    loss: Loss,
    descent: Descent,
) -> Tensor:
    """Learn the probabilities with which units stay.

    Args:
        start: Initial values, ``(units,)``, float64; they are projected first.
        sizes: Number of units in each part.
        keep: Number of units of each part that stay.
        loss: Evaluates a mask, ``(units,)``, of 0 and 1.
        descent: How to learn.

    Returns:
        The probabilities, ``(units,)``; in every part they add up to the number that stays.
    """
    generator = torch.Generator().manual_seed(descent.seed)
    theta = project_parts(start, sizes, keep)
    average: Tensor | None = None
    for step in track(range(descent.steps), "width: steps of the policy gradient"):
        draws = torch.rand((DRAWS, len(theta)), generator=generator, dtype=theta.dtype)
        masks = (draws < theta).to(theta.dtype)
        losses = torch.tensor(
            [loss(step, draw, mask) for draw, mask in enumerate(masks)], dtype=theta.dtype
        )
        average = moving_average(average, losses)
        baseline = losses.mean() if descent.estimator == "unbiased" else average
        slope = gradient(masks, losses, theta, baseline, descent.estimator)
        rate = descent.learning_rate * (1 + math.cos(math.pi * step / descent.steps)) / 2
        theta = project_parts(theta - rate * slope, sizes, keep)
    return theta


def gradient(
    masks: Tensor, losses: Tensor, theta: Tensor, baseline: Tensor, estimator: Estimator
) -> Tensor:
    """Estimate the gradient of the expected loss: ``sum_j (L_j - baseline) s(m_j) / (K - 1)``.

    ``unbiased`` has the score function ``s(m) = (m - theta) / (theta (1 - theta))``. With the mean
    of the K losses as baseline, its expectation is the gradient. Where theta is 0 or 1 no mask
    differs, so nothing can be estimated and the value is 0.

    ``released`` divides by the square root of ``theta (1 - theta)``, as the released code does:
    every expected component is that of the gradient times this root. With the moving average as
    baseline, which contains the present losses, also times ``K (1 - 1 / (K T)) / (K - 1)``.

    Args:
        masks: ``(K, units)``.
        losses: ``(K,)``.
        theta: Probabilities, ``(units,)``.
        baseline: Subtracted from the losses; a scalar.
        estimator: Which of the two.

    Returns:
        ``(units,)``.

    Source: arXiv 2406.10576 and its released code. The factors are proved in the tests.
    """
    if estimator == "released":
        spread = ((theta + EPSILON) * (1 - theta + EPSILON)).sqrt()
    else:
        spread = theta * (1 - theta)
    scores = torch.where(spread > 0, (masks - theta) / spread, 0.0)
    return (losses - baseline) @ scores / (len(losses) - 1)


def moving_average(former: Tensor | None, losses: Tensor) -> Tensor:
    """The released code's baseline: an average over about AVERAGED steps, the present one too."""
    mean = losses.mean()
    return mean if former is None else (1 - 1 / AVERAGED) * former + mean / AVERAGED


def project_parts(values: Tensor, sizes: Sequence[int], keep: Sequence[int]) -> Tensor:
    """`project` every part of ``(units,)`` onto its own sum."""
    parts = zip(torch.split(values, list(sizes)), keep, strict=True)
    return torch.cat([project(part, total) for part, total in parts])


def project(values: Tensor, total: float) -> Tensor:
    """The nearest point, in the Euclidean norm, of ``0 <= theta <= 1`` with a given sum.

    It is ``clamp(values - v, 0, 1)`` with the v for which the sum is right, found by bisection
    until no float64 lies between the bounds. The released code bisects over ``v >= 0`` only, so a
    sum that is too small stays so; here v may be negative.

    Args:
        values: ``(units,)``, float64, finite.
        total: The sum, from 0 to the number of units.
    """
    low, high = float(values.min()) - 1, float(values.max())
    middle = (low + high) / 2
    while low < middle < high:
        if float((values - middle).clamp(0, 1).sum()) > total:
            low = middle
        else:
            high = middle
        middle = (low + high) / 2
    return (values - high).clamp(0, 1)
