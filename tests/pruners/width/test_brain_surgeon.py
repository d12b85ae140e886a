"""Optimal Brain Surgeon against least squares, brute force and planted columns, in float64."""

from __future__ import annotations

import itertools

import pytest
import torch

from slm_plugin.pruners.width.brain_surgeon import best_ridge, eliminate

HIDDEN, FEATURES, TOKENS = 7, 16, 200


def problem(seed: int = 0, features: int = FEATURES) -> tuple[torch.Tensor, torch.Tensor]:
    """A map and correlated inputs: ``(hidden, features)`` and ``(tokens, features)``."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(features, features, generator=generator, dtype=torch.float64)
    inputs = torch.randn(TOKENS, features, generator=generator, dtype=torch.float64) @ mixing
    weight = torch.randn(HIDDEN, features, generator=generator, dtype=torch.float64)
    return weight, inputs


def damped(inputs: torch.Tensor, ridge: float) -> torch.Tensor:
    """The Gram matrix with its ridge."""
    matrix = inputs.T @ inputs
    return matrix + ridge * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=matrix.dtype)


def restored(weight: torch.Tensor, matrix: torch.Tensor, kept: list[int]) -> torch.Tensor:
    """The least-squares map on the kept columns, and 0 elsewhere."""
    found = torch.zeros_like(weight)
    found[:, kept] = torch.linalg.solve(matrix[kept][:, kept], matrix[kept] @ weight.T).T
    return found


def cost(weight: torch.Tensor, other: torch.Tensor, matrix: torch.Tensor) -> float:
    """``tr(D H D')``."""
    change = other - weight
    return float((change @ matrix * change).sum())


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("at_once", [1, 3, 8])
@pytest.mark.parametrize("ridge", [0.0, 1e-2, 1.0])
def test_what_is_left_is_the_least_squares_restoration(
    size: int, at_once: int, ridge: float
) -> None:
    """After any number of removals; and the errors are the true ones."""
    weight, inputs = problem()
    matrix = damped(inputs, ridge)
    units = FEATURES // size
    for most in range(1, units):
        found = eliminate(
            weight, inputs.T @ inputs, ridge=ridge, most=most, size=size, at_once=at_once
        )
        gone = {u * size + i for u in found.order for i in range(size)}
        kept = [column for column in range(FEATURES) if column not in gone]
        expected = restored(weight, matrix, kept)
        assert torch.allclose(found.weight, expected, atol=1e-9)
        assert found.errors[-1] == pytest.approx(cost(weight, expected, matrix), rel=1e-8)
        assert found.errors == sorted(found.errors) and len(set(found.order)) == most


def test_every_error_of_the_curve_is_true() -> None:
    """Also between the removals of one step."""
    weight, inputs = problem(3)
    matrix = damped(inputs, 1e-2)
    found = eliminate(weight, inputs.T @ inputs, ridge=1e-2, most=FEATURES)
    for number, error in enumerate(found.errors, start=1):
        kept = [c for c in range(FEATURES) if c not in found.order[:number]]
        assert error == pytest.approx(
            cost(weight, restored(weight, matrix, kept), matrix), rel=1e-8
        )


@pytest.mark.parametrize("seed", range(5))
def test_the_first_removal_is_the_best_single_one(seed: int) -> None:
    """By trying all of them; and eight at once are never better than the best eight."""
    weight, inputs = problem(seed, 10)
    matrix = damped(inputs, 0.0)
    found = eliminate(weight, matrix, ridge=0.0, most=3, at_once=1)

    def error(gone: tuple[int, ...]) -> float:
        kept = [column for column in range(10) if column not in gone]
        return cost(weight, restored(weight, matrix, kept), matrix)

    best = min(range(10), key=lambda column: error((column,)))
    assert found.order[0] == best
    optimum = min(error(gone) for gone in itertools.combinations(range(10), 3))
    assert optimum <= found.errors[-1] * (1 + 1e-9)
    together = eliminate(weight, matrix, ridge=0.0, most=3, at_once=3)
    assert found.errors[-1] <= together.errors[-1] * 1.5
    assert together.errors[-1] <= found.errors[-1] * 3


def test_of_two_equal_columns_one_goes_for_nothing() -> None:
    """The other takes the sum of both, and the output stays."""
    weight, inputs = problem(1)
    inputs[:, 5] = inputs[:, 11]
    found = eliminate(weight, inputs.T @ inputs, ridge=1e-12, most=1, at_once=1)
    (gone,) = found.order
    assert gone in (5, 11)
    other = 16 - gone
    assert torch.allclose(found.weight[:, other], weight[:, 5] + weight[:, 11], atol=1e-6)
    assert torch.allclose(inputs @ found.weight.T, inputs @ weight.T, atol=1e-4)


def test_dead_columns_go_first_and_cost_nothing() -> None:
    """Their Gram matrix is singular, even without a ridge."""
    weight, inputs = problem(2)
    inputs[:, [3, 8]] = 0
    found = eliminate(weight, inputs.T @ inputs, ridge=0.0, most=4)
    assert found.order[:2] == [3, 8] and found.errors[:2] == [0, 0] and found.errors[2] > 0
    dead = torch.zeros(FEATURES, FEATURES, dtype=torch.float64)
    assert eliminate(weight, dead, ridge=1e-2, most=FEATURES).errors == [0.0] * FEATURES


def test_a_group_is_removed_as_its_columns_are() -> None:
    """The same map and error, whether a group goes at once or column by column."""
    weight, inputs = problem(4)
    matrix = inputs.T @ inputs
    group = eliminate(weight, matrix, ridge=1e-2, most=1, size=4)
    first = group.order[0] * 4
    kept = [c for c in range(FEATURES) if not first <= c < first + 4]
    expected = restored(weight, damped(inputs, 1e-2), kept)
    assert torch.allclose(group.weight, expected, atol=1e-9)
    costs = [
        cost(weight, restored(weight, damped(inputs, 1e-2), kept), damped(inputs, 1e-2))
        for kept in (
            [c for c in range(FEATURES) if not 4 * unit <= c < 4 * unit + 4] for unit in range(4)
        )
    ]
    assert group.order == [costs.index(min(costs))]


def test_it_beats_the_scores_of_single_columns_after_the_same_restoration() -> None:
    """Over many correlated inputs: magnitude, and the norm of what a column adds."""
    errors = torch.zeros(3)
    removed = 4
    for seed in range(20):
        weight, inputs = problem(seed + 10)
        matrix = damped(inputs, 1e-6)
        found = eliminate(weight, inputs.T @ inputs, ridge=1e-6, most=removed, at_once=1)
        scores = (weight.norm(dim=0), weight.norm(dim=0) * inputs.norm(dim=0))
        kept = (score.argsort()[removed:].tolist() for score in scores)
        others = [cost(weight, restored(weight, matrix, one), matrix) for one in kept]
        errors += torch.tensor([found.errors[-1], *others])
    assert errors[0] < 0.7 * errors[1:].min()


def test_the_ridge_is_chosen_on_other_samples() -> None:
    """Few noisy tokens want a large one, many want a small one."""
    weight, inputs = problem(6)
    noise = torch.randn(TOKENS, FEATURES, dtype=torch.float64) * 4
    few, many = inputs[:10] + noise[:10], inputs.repeat(5, 1)
    held_out = inputs.T @ inputs
    large = best_ridge(weight, few.T @ few, held_out, 6, 1)
    small = best_ridge(weight, many.T @ many, held_out, 6, 1)
    assert large > small
