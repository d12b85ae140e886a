"""Ridge least squares from sums over tokens: what 100,000 tokens cost in memory is one matrix.

Every fifth sample is held out. The strength of the ridge is the one that predicts those best. They
never take part in a fit: layers above one that was fitted on them would be judged by what they saw.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_plugin.errors import CalibrationError, NumericalError
from slm_plugin.lazy import torch
from slm_plugin.recovery.closed_form.held_out import is_held_out

if TYPE_CHECKING:
    from torch import Tensor

# Relative to the mean of the Gram matrix's diagonal; beside them stands the infinite one, which
# changes nothing.
RIDGES = (10.0, 1.0, 1e-1, 1e-2, 1e-3, 1e-4)


@dataclass(frozen=True, slots=True)
class Fit:
    """What least squares found.

    Attributes:
        change: ``(features, hidden)``, float64, to be added to what the features are multiplied
            with; None when no ridge predicts the held-out samples better than no change.
        ridge: The ridge chosen, relative to the mean of the Gram matrix's diagonal.
        before: What the held-out samples lack, as a share of the norm of what is wanted.
        after: What they lack with the change, which is fitted on the other samples.
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
    """Least squares of what outputs lack on the features of a linear map, batch after batch.

    Args:
        place: What is fitted, for messages.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._fitted = _Sums()
        self._held_out = _Sums()

    def add(self, start: int, features: Tensor, lack: Tensor, target: Tensor) -> None:
        """Take a batch in.

        Args:
            start: Index of the batch's first sample among all.
            features: What the linear map sees, ``(samples, length, features)``.
            lack: What its output should have more, ``(samples, length, hidden)``.
            target: The state that is wanted, ``(samples, length, hidden)``: errors are a share
                of its norm.
        """
        held_out = is_held_out(torch.arange(start, start + len(features)))
        for sums, chosen in ((self._held_out, held_out), (self._fitted, ~held_out)):
            if chosen.any():
                sums.add(*(_rows(tensor, chosen) for tensor in (features, lack, target)))

    @property
    def lack(self) -> float:
        """Squared norm of what the held-out samples lack."""
        return self._held_out.lack

    def solve(self) -> Fit:
        """Fit, with the ridge that predicts the held-out samples best.

        Raises:
            CalibrationError: No sample is left to fit on.
            NumericalError: Activations are NaN or infinite.
        """
        if not self._fitted.tokens or not self._held_out.tokens:
            raise CalibrationError(
                f"{self._place} is fitted on fewer than 2 calibration samples",
                hint="one chooses the ridge and the others are fitted: raise `samples`",
            )
        for sums in (self._fitted, self._held_out):
            if not sums.finite():
                raise NumericalError(
                    f"activations at {self._place} are NaN or infinite",
                    hint="load the model in float32 or bfloat16 and check its weights",
                )
        held_out = self._held_out
        change, best, least = None, math.inf, held_out.lack
        if self._fitted.gram.trace() > 0:
            for ridge in RIDGES:
                tried = self._fitted.solved(ridge)
                error = held_out.error(tried)
                if error < least:
                    change, best, least = tried, ridge, error
        return Fit(
            change=change,
            ridge=best,
            before=share(held_out.lack, held_out.target),
            after=share(least, held_out.target),
        )


class _Sums:
    """Sums over tokens in float64: Gram matrix of the features, cross terms, squared norms."""

    def __init__(self) -> None:
        self.gram = torch.zeros((), dtype=torch.float64)
        self.cross = torch.zeros((), dtype=torch.float64)
        self.lack = 0.0
        self.target = 0.0
        self.tokens = 0

    def add(self, features: Tensor, lack: Tensor, target: Tensor) -> None:
        self.gram = features.T @ features + self.gram.to(features.device)
        self.cross = features.T @ lack + self.cross.to(features.device)
        self.lack += float(lack.square().sum())
        self.target += float(target.square().sum())
        self.tokens += len(features)

    def finite(self) -> bool:
        # A feature that is NaN makes its place on the diagonal NaN, and so the trace.
        return all(map(math.isfinite, (float(self.gram.trace()), self.lack, self.target)))

    def solved(self, ridge: float) -> Tensor:
        """The change that lowers the error most when its squared norm costs ``ridge``."""
        matrix = self.gram.clone()
        matrix.diagonal().add_(ridge * self.gram.diagonal().mean())
        return torch.cholesky_solve(self.cross, torch.linalg.cholesky(matrix))

    def error(self, change: Tensor) -> float:
        """Squared norm of what is lacking still with a change: a quadratic form in the sums."""
        left = self.lack + float((change * (self.gram @ change - 2 * self.cross)).sum())
        return max(0.0, left)


def in_float64(tensor: Tensor) -> Tensor:
    """The tensor in float64, on its device or, as Apple's GPUs do not know it, on the CPU."""
    return (tensor.cpu() if tensor.device.type == "mps" else tensor).double()


def _rows(tensor: Tensor, samples: Tensor) -> Tensor:
    """Every token of the chosen samples in float64, ``(tokens, features)``."""
    return in_float64(tensor[samples.to(tensor.device)].flatten(0, 1))


def share(error: float, norm: float) -> float:
    """The root of a squared error, as a share of that of a squared norm; 0 where that is 0."""
    return float((error / norm) ** 0.5) if norm else 0.0
