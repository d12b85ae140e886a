"""Ridge least squares from sums over tokens, so that memory does not grow with their number.

Every fifth sample is held out, and the ridge with the least error on these is chosen. No fit uses
them, or the errors of the layers above would be measured on training data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_plugin.calibration.captures import in_float64
from slm_plugin.calibration.held_out import is_held_out
from slm_plugin.errors import CalibrationError, NumericalError
from slm_plugin.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

# Relative to the mean of the Gram matrix's diagonal. No change, an infinite ridge, is tried too.
RIDGES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)


@dataclass(frozen=True, slots=True)
class Fit:
    """The result of a regression.

    Attributes:
        change: ``(features, hidden)``, float64, to add to the linear map; None when no ridge
            lowers the held-out error.
        ridge: The ridge chosen, relative to the mean of the Gram matrix's diagonal.
        before: Relative error of the held-out samples without the change.
        after: Relative error of the held-out samples with the change.
    """

    change: Tensor | None
    ridge: float
    before: float
    after: float

    def describe(self) -> str:
        """Ridge and errors in words."""
        if self.change is None:
            return f"left as it is, held-out error {self.before:.2%}"
        return f"ridge {self.ridge:g}, held-out error {self.before:.2%} to {self.after:.2%}"


class Regression:
    """Least squares of residuals on the features of a linear map, batch by batch.

    Args:
        place: Name of the fitted layer, for messages.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._fitted = _Sums()
        self._held_out = _Sums()

    def add(self, start: int, features: Tensor, residual: Tensor, target: Tensor) -> None:
        """Add a batch to the sums.

        Args:
            start: Index of the batch's first sample in the calibration set.
            features: Input of the linear map, ``(samples, length, features)``.
            residual: Target minus output, ``(samples, length, hidden)``.
            target: The target state, ``(samples, length, hidden)``; errors are relative to its
                norm.
        """
        held_out = is_held_out(torch.arange(start, start + len(features)))
        for sums, chosen in ((self._held_out, held_out), (self._fitted, ~held_out)):
            if chosen.any():
                sums.add(*(_rows(tensor, chosen) for tensor in (features, residual, target)))

    @property
    def residual(self) -> float:
        """Squared norm of the held-out samples' residuals."""
        return self._held_out.residual

    @property
    def target(self) -> float:
        """Squared norm of the held-out samples' targets."""
        return self._held_out.target

    def solve(self) -> Fit:
        """Fit with the ridge that has the least held-out error.

        Raises:
            CalibrationError: There are fewer than 2 samples.
            NumericalError: Activations are NaN or infinite.
        """
        if not self._fitted.tokens or not self._held_out.tokens:
            raise CalibrationError(
                f"{self._place} is fitted on fewer than 2 calibration samples",
                hint="one sample is held out to choose the ridge: raise `samples`",
            )
        for sums in (self._fitted, self._held_out):
            if not sums.finite():
                raise NumericalError(
                    f"activations at {self._place} are NaN or infinite",
                    hint="load the model in float32 or bfloat16 and check its weights",
                )
        held_out = self._held_out
        change, best, least = None, math.inf, held_out.residual
        if self._fitted.gram.trace() > 0:
            for ridge in RIDGES:
                tried = self._fitted.solved(ridge)
                error = held_out.error(tried)
                if error < least:
                    change, best, least = tried, ridge, error
        return Fit(
            change=change,
            ridge=best,
            before=share(held_out.residual, held_out.target),
            after=share(least, held_out.target),
        )


class _Sums:
    """Sums over tokens in float64: Gram matrix of the features, cross terms, squared norms."""

    def __init__(self) -> None:
        self.gram = torch.zeros((), dtype=torch.float64)
        self.cross = torch.zeros((), dtype=torch.float64)
        self.residual = 0.0
        self.target = 0.0
        self.tokens = 0

    def add(self, features: Tensor, residual: Tensor, target: Tensor) -> None:
        self.gram = features.T @ features + self.gram.to(features.device)
        self.cross = features.T @ residual + self.cross.to(features.device)
        self.residual += float(residual.square().sum())
        self.target += float(target.square().sum())
        self.tokens += len(features)

    def finite(self) -> bool:
        # A NaN feature makes its diagonal entry NaN, and so the trace.
        return all(map(math.isfinite, (float(self.gram.trace()), self.residual, self.target)))

    def solved(self, ridge: float) -> Tensor:
        """The ridge solution."""
        matrix = self.gram.clone()
        matrix.diagonal().add_(ridge * self.gram.diagonal().mean())
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(matrix))

    def error(self, change: Tensor) -> float:
        """Squared norm of the residual after a change, from the sums alone."""
        left = self.residual + float((change * (self.gram @ change - 2 * self.cross)).sum())
        return max(0.0, left)


def _rows(tensor: Tensor, samples: Tensor) -> Tensor:
    """Every token of the chosen samples in float64, ``(tokens, features)``."""
    return in_float64(tensor[samples.to(tensor.device)].flatten(0, 1))


def share(error: float, norm: float) -> float:
    """Relative error from a squared error and a squared norm; 0 where the norm is 0."""
    return float((error / norm) ** 0.5) if norm else 0.0
