"""Learning of probabilities: the projection, both estimators by enumeration, and the descent."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from slm_plugin.pruners.width.policy_gradient import (
    AVERAGED,
    DRAWS,
    Descent,
    Estimator,
    gradient,
    learn,
    moving_average,
    project,
    project_parts,
)

THETA = torch.tensor([0.9, 0.5, 0.2], dtype=torch.float64)
FORMER = torch.tensor(1.7, dtype=torch.float64)


def nearest(values: Tensor, total: float) -> Tensor:
    """The projection by trying which components are 0, which are 1 and which lie between."""
    best = None
    for sides in itertools.product((0.0, 1.0, None), repeat=len(values)):
        free = [place for place, side in enumerate(sides) if side is None]
        point = torch.tensor([0.0 if side is None else side for side in sides], dtype=values.dtype)
        left = total - float(point.sum())
        if free:
            point[free] = values[free] + (left - values[free].sum()) / len(free)
        elif abs(left) > 1e-12:
            continue
        if ((point < 0) | (point > 1)).any():
            continue
        if best is None or (point - values).square().sum() < (best - values).square().sum():
            best = point
    assert best is not None
    return best


@pytest.mark.parametrize("total", [0, 1, 2.5, 4, 5])
def test_the_projection_is_the_nearest_point(total: float) -> None:
    """Against every choice of active bounds, with sums that were too large and too small."""
    generator = torch.Generator().manual_seed(1)
    for scale in (0.1, 1.0, 1e3):
        values = scale * torch.randn(5, generator=generator, dtype=torch.float64)
        found = project(values, total)
        assert torch.allclose(found, nearest(values, total), atol=1e-9)
        assert torch.allclose(project(found, total), found, atol=1e-12)


def test_the_budget_is_met_exactly_and_in_every_part() -> None:
    """To rounding, also where one value is out of all proportion; no probability leaves 0..1."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randn(3000, generator=generator, dtype=torch.float64)
    values[7], values[2000] = 1e15, -1e15
    found = project_parts(values, [1000, 2000], [800, 333])
    assert float(found[:1000].sum()) == pytest.approx(800, abs=1e-9)
    assert float(found[1000:].sum()) == pytest.approx(333, abs=1e-9)
    assert found.min() >= 0 and found.max() <= 1
    assert found[7] == 1 and found[2000] == 0
    # So the units that stay are those with probabilities of 1, and others above 0.
    assert (found[:1000] == 1).sum() <= 800 <= (found[:1000] > 0).sum()


def test_a_sum_that_is_too_small_is_raised() -> None:
    """The released solver leaves it: it bisects over v >= 0."""
    values = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)
    assert torch.allclose(project(values, 1.2), values + 0.2)


def masks() -> Tensor:
    """All masks of three units."""
    return torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)), dtype=torch.float64)


def losses() -> Tensor:
    """A loss of every mask, with interactions."""
    return torch.randn(8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def probabilities(theta: Tensor) -> Tensor:
    """The probability of every mask."""
    return torch.where(masks() > 0, theta, 1 - theta).prod(1)


def exact() -> Tensor:
    """The gradient of the expected loss, by autograd on the sum over all masks."""
    theta = THETA.clone().requires_grad_()
    (found,) = torch.autograd.grad((probabilities(theta) * losses()).sum(), theta)
    return found


def draws() -> Iterator[tuple[float, Tensor, Tensor]]:
    """Every pair of masks with its probability and its losses."""
    weights = probabilities(THETA)
    for pair in itertools.product(range(8), repeat=DRAWS):
        chosen = list(pair)
        yield float(weights[chosen].prod()), masks()[chosen], losses()[chosen]


def expected(estimator: Estimator, former: Tensor | None) -> Tensor:
    """The expectation of an estimate over all pairs of masks."""
    found = torch.zeros_like(THETA)
    for weight, drawn, seen in draws():
        average = moving_average(former, seen)
        baseline = seen.mean() if estimator == "unbiased" else average
        found += weight * gradient(drawn, seen, THETA, baseline, estimator)
    return found


def test_the_unbiased_estimate_has_the_gradient_as_its_mean() -> None:
    """Over every pair of masks: division by K - 1 makes up for the mean in the baseline."""
    assert torch.allclose(expected("unbiased", FORMER), exact(), atol=1e-12)


def test_the_released_estimate_is_the_gradient_times_two_factors() -> None:
    """The root of theta (1 - theta) for every unit, and 1.8 for the average of five steps."""
    root = (THETA * (1 - THETA)).sqrt()
    factor = DRAWS * (1 - 1 / (DRAWS * AVERAGED)) / (DRAWS - 1)
    assert factor == pytest.approx(1.8)
    assert torch.allclose(expected("released", FORMER), factor * root * exact(), atol=1e-6)
    # In the first step the average is the mean of the present losses.
    assert torch.allclose(expected("released", None), root * exact(), atol=1e-6)


@pytest.mark.parametrize("estimator", ["unbiased", "released"])
def test_units_that_cannot_vary_are_not_estimated(estimator: Estimator) -> None:
    """Neither NaN nor noise where a probability is 0 or 1."""
    theta = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    drawn = torch.tensor([[0.0, 1.0, 1.0], [0.0, 1.0, 0.0]], dtype=torch.float64)
    seen = torch.tensor([1.0, 3.0], dtype=torch.float64)
    found = gradient(drawn, seen, theta, seen.mean(), estimator)
    assert found[:2].tolist() == [0, 0] and found[2] < 0


@pytest.mark.parametrize("estimator", ["unbiased", "released"])
def test_useless_units_lose_their_probability(estimator: Estimator) -> None:
    """From equal starts, by losses alone; the sums are right at every step."""
    useful = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 1.0, 1.0], dtype=torch.float64)
    seen = []

    def loss(step: int, draw: int, mask: Tensor) -> float:
        seen.append((step, draw))
        return float((useful * (1 - mask)).sum())

    start = torch.full((8,), 0.5, dtype=torch.float64)
    found = learn(start, [4, 4], [2, 3], loss, Descent(100, 0.05, estimator, seed=5))
    assert [float(part.sum()) for part in found.split(4)] == pytest.approx([2, 3])
    for part, needed in zip(found.split(4), useful.split(4), strict=True):
        assert part[needed == 0].max() < part[needed == 1].min()
    assert seen == [(step, draw) for step in range(100) for draw in range(DRAWS)]
