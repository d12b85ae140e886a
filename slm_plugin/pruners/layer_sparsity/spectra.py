"""Relative sparsity from the spectra of a layer's weights, without data (AlphaPruning)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from slm_plugin.errors import NumericalError
from slm_plugin.lazy import torch
from slm_plugin.models.streaming import values
from slm_plugin.models.view import DecoderView
from slm_plugin.pruners.layer_sparsity.scaling import scaled

if TYPE_CHECKING:
    from torch import Tensor

BINS = 100
# Bounds of x_min around the peak of the histogram.
PEAK = (0.95, 1.5)


def alpha(view: DecoderView, spread: float, *, peak: bool = False) -> list[float]:
    """Relative sparsity ``1 - spread + 2 * spread * u``, u the layer's mean exponent, scaled.

    A power law ``p(x) ~ x^-alpha`` is fitted to the upper eigenvalues of ``W^T W`` of every linear
    map. A heavy tail, of small alpha, is taken as a sign of a layer that has learned much. The mean
    over a layer's maps, scaled to 0..1 over the layers, is u.

    Args:
        view: The model.
        spread: Half the distance between the largest and the smallest value.
        peak: Fit from the peak of the spectrum (`peak_start`), not from its median.

    Returns:
        One value per layer, from ``1 - spread`` to ``1 + spread``.

    Raises:
        NumericalError: A matrix has no tail to fit.

    Source: Lu et al. 2024, AlphaPruning (arXiv 2410.10912), section 3: PL_Alpha_Hill and the linear
        mapping, with spread for tau (``epsilon`` of the released code).
    """
    exponents = []
    for index, layer in enumerate(view.layers):
        found = [
            hill_exponent(spectrum(values(linear.weight)), peak_start if peak else median_start)
            for linear in view.projections(layer).values()
        ]
        if not all(map(math.isfinite, found)):
            raise NumericalError(
                f"layer {index} has a matrix whose singular values are 0 or all equal: its "
                "spectrum has no tail to fit",
                hint="choose another measure than alpha or alpha_peak",
            )
        exponents.append(sum(found) / len(found))
    return [1 - spread + 2 * spread * place for place in scaled(exponents)]


def spectrum(weight: Tensor) -> Tensor:
    """Eigenvalues of ``W^T W`` that are not 0, ascending, ``(rank,)``, float64.

    The smaller of ``W^T W`` and ``W W^T`` has them all.
    """
    wide = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().T
    eigenvalues = torch.linalg.eigvalsh(wide @ wide.T).cpu()
    noise = torch.finfo(torch.float64).eps * len(eigenvalues) * eigenvalues[-1]
    positive: Tensor = eigenvalues[eigenvalues > noise]
    return positive


def hill_exponent(eigenvalues: Tensor, start: Callable[[Tensor], int]) -> float:
    """Exponent of the power law of the eigenvalues from one index on, by Hill's estimator.

    Args:
        eigenvalues: Positive, ascending, ``(rank,)``.
        start: Returns the index of x_min.

    Returns:
        ``1 + n / sum(ln(x_t / x_min))`` over the n values from x_min on; infinite or NaN where they
        are all equal or there are none.
    """
    if not len(eigenvalues):
        return math.nan
    tail = eigenvalues[start(eigenvalues) :]
    total = float((tail / tail[0]).log().sum())
    return 1 + len(tail) / total if total > 0 else math.inf


def median_start(eigenvalues: Tensor) -> int:
    """Index of the median, the published choice that needs no search."""
    return len(eigenvalues) // 2


def peak_start(eigenvalues: Tensor) -> int:
    """Index near the peak of the histogram of log10 x at which the power law fits best.

    Candidates lie from 0.95 to 1.5 times the left edge of the fullest of 100 bins. The released
    code compares the values with the logarithm of the lower bound, so nearly all small eigenvalues
    are candidates there. Without any candidate the nearest value to the peak is taken.

    Returns:
        The candidate with the least Kolmogorov-Smirnov distance.
    """
    logs = eigenvalues.log10()
    low, high = float(logs[0]), float(logs[-1])
    fullest = int(torch.histc(logs, BINS, low, high).argmax())
    peak = 10 ** (low + (high - low) * fullest / BINS)
    near = (eigenvalues >= PEAK[0] * peak) & (eigenvalues <= PEAK[1] * peak)
    candidates: list[int] = near.nonzero().flatten().tolist()
    if not candidates:
        return int((eigenvalues - peak).abs().argmin())
    return min(candidates, key=lambda index: distance(eigenvalues[index:]))


def distance(tail: Tensor) -> float:
    """Kolmogorov-Smirnov distance between a tail and the power law that is fitted to it."""
    exponent = hill_exponent(tail, lambda _: 0)
    if not math.isfinite(exponent):
        return math.inf
    ranks = torch.arange(len(tail), dtype=tail.dtype) / len(tail)
    return float((1 - (tail / tail[0]) ** (1 - exponent) - ranks).abs().max())
