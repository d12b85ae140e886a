"""Structured Optimal Brain Surgeon: remove inputs of a linear map and adapt the others exactly.

For a linear map W, ``(hidden, features)``, with inputs of Gram matrix H, the error of a change D is
``tr(D H D')``. Removing a group G of columns with the best change of all others costs
``tr(W_G ([H^-1]_GG)^-1 W_G')``; it makes W into ``W - W_G ([H^-1]_GG)^-1 [H^-1]_G,:`` and removes
the group's rows and columns from ``H`` by one block elimination of ``H^-1``. After any order of
removals the remaining columns are the least-squares restoration ``W H_:,S (H_SS)^-1``, and the
costs add up to the error.

Source: Hassibi and Stork 1993, Optimal Brain Surgeon; structured as in Kurtic et al. 2023, ZipLM
(arXiv 2302.04089), section 3.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_plugin.errors import CalibrationError
from slm_plugin.lazy import torch
from slm_plugin.pruners.input_sums import ReaderInputs, gram

if TYPE_CHECKING:
    from torch import Tensor

# Single columns that go between two rankings: 1 costs eight times as much and gains little.
AT_ONCE = 8
# Ridges tried, relative to the mean of the Gram matrix's diagonal.
RIDGES = (1.0, 1e-1, 1e-2, 1e-3)


@dataclass(frozen=True, slots=True)
class Elimination:
    """The result of eliminating units.

    Attributes:
        order: Units in the order of their removal.
        errors: Squared error of the output after each removal, of this ridge problem.
        weight: The adapted map, ``(hidden, features)``; removed columns are 0.
    """

    order: list[int]
    errors: list[float]
    weight: Tensor


def eliminate(
    weight: Tensor,
    gram: Tensor,
    *,
    ridge: float,
    most: int,
    size: int = 1,
    at_once: int = AT_ONCE,
    parts: int = 1,
) -> Elimination:
    """Remove units greedily, the cheapest first, and adapt the others.

    Units whose inputs are all 0 go first and cost nothing. With several parts the next unit comes
    from those that have lost fewest, so that all have lost the same number after every round.

    Args:
        weight: The linear map, ``(hidden, features)``, float64.
        gram: Gram matrix of its inputs, ``(features, features)``, float64.
        ridge: Added to the diagonal, relative to its mean.
        most: Number of units to remove.
        size: Columns of a unit, which are consecutive.
        at_once: Units that go between two rankings; one where there are parts.
        parts: Equal runs of the units, each of which loses ``most // parts``.
    """
    units = weight.shape[1] // size
    owners = torch.arange(units, device=gram.device) // (units // parts)
    left = weight.clone()
    diagonal = gram.diagonal().reshape(units, size).sum(1)
    dead = [(diagonal == 0).logical_and(owners == part).nonzero() for part in range(parts)]
    order = torch.cat([found.flatten()[: most // parts] for found in dead]).tolist()
    errors = [0.0] * len(order)
    left[:, _columns(torch.tensor(order, dtype=torch.long), size)] = 0
    names = diagonal.nonzero().flatten()
    if not len(names):
        return Elimination(order, errors, left)
    columns = _columns(names, size)
    damped = gram[columns][:, columns]
    damped.diagonal().add_(ridge * gram.diagonal().mean())
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    current = left[:, columns]
    while len(order) < most:
        count = min(at_once, most - len(order)) if parts == 1 else 1
        costs = _costs(current, inverse, size)
        if parts > 1:
            lost = torch.bincount(owners[order], minlength=parts)
            costs = costs.where(lost[owners[names]] == lost.min(), torch.inf)
        chosen = costs.argsort(stable=True)[:count]
        here = _columns(chosen, size)
        block = torch.linalg.cholesky(inverse[here][:, here])
        # Column by column, the squared norms of this are the costs of one removal after another.
        half = torch.linalg.solve_triangular(block, current[:, here].T, upper=False)
        steps = half.square().sum(1).reshape(count, size).sum(1)
        errors += ((errors[-1] if errors else 0.0) + steps.cumsum(0)).tolist()
        order += names[chosen].tolist()
        change = torch.cholesky_solve(inverse[here], block)
        current = current - current[:, here] @ change
        inverse = inverse - inverse[:, here] @ change
        stay = torch.ones(len(names), dtype=torch.bool, device=gram.device)
        stay[chosen] = False
        kept = _columns(stay.nonzero().flatten(), size)
        left[:, _columns(names[chosen], size)] = 0
        names, current, inverse = names[stay], current[:, kept], inverse[kept][:, kept]
    left[:, _columns(names, size)] = current
    return Elimination(order, errors, left)


def best_ridge(
    weight: Tensor, fitted: Tensor, held_out: Tensor, removed: int, size: int, parts: int = 1
) -> float:
    """The ridge with which the held-out error after the removal is least.

    Args:
        weight: The linear map, ``(hidden, features)``, float64.
        fitted: Gram matrix of the fitted samples, ``(features, features)``.
        held_out: That of the held-out samples.
        removed: Number of units to remove.
        size: Columns of a unit.
        parts: Equal runs of the units, each of which loses the same number.
    """

    def error(ridge: float) -> float:
        found = eliminate(weight, fitted, ridge=ridge, most=removed, size=size, parts=parts)
        change = found.weight - weight
        return float((change @ held_out * change).sum())

    return min(RIDGES, key=error)


def _costs(weight: Tensor, inverse: Tensor, size: int) -> Tensor:
    """Cost of removing each unit alone, ``(units,)``."""
    if size == 1:
        return weight.square().sum(0) / inverse.diagonal()
    costs = []
    for first in range(0, weight.shape[1], size):
        here = slice(first, first + size)
        block = torch.linalg.cholesky(inverse[here, here])
        half = torch.linalg.solve_triangular(block, weight[:, here].T, upper=False)
        costs.append(half.square().sum())
    return torch.stack(costs)


def _columns(units: Tensor, size: int) -> Tensor:
    """The columns of some units, unit by unit."""
    if size == 1:
        return units
    steps = torch.arange(size, device=units.device)
    return (units[:, None] * size + steps).flatten()


def error_curve(inputs: ReaderInputs, removed: int, size: int, parts: int = 1) -> Tensor:
    """Error of a projection's output when units have gone, for every number of units.

    The ridge is the best one for the removal of so many; the order is that of all samples.

    Args:
        inputs: The inputs of the projection.
        removed: Number of units that will go.
        size: Columns of a unit.
        parts: Equal runs of the units, each of which loses the same number.

    Returns:
        ``(units,)``, from 0 to 1: for each unit, the squared error relative to the squared output,
        both with the ridge, once it and all units with smaller errors are removed and the others
        are adapted.

    Raises:
        CalibrationError: There are fewer than 2 samples.
    """
    if inputs.samples < 2:
        raise CalibrationError(
            f"layer {inputs.layer} is ranked on fewer than 2 calibration samples",
            hint="one sample is held out to choose the ridge: raise `samples`",
        )
    fitted, held_out = gram(inputs)
    weight, whole = inputs.weight, fitted + held_out
    ridge = best_ridge(weight, fitted, held_out, removed, size, parts)
    units = weight.shape[1] // size
    found = eliminate(weight, whole, ridge=ridge, most=units, size=size, parts=parts)
    curve = torch.empty(units, dtype=torch.float64)
    curve[torch.tensor(found.order)] = torch.tensor(found.errors, dtype=torch.float64)
    # Without any unit the error is the whole output.
    return curve / found.errors[-1] if found.errors[-1] else curve
