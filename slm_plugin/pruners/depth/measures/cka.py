"""Centred kernel alignment (CKA) of two representations of the same samples.

All functions use Gram matrices of ``(samples, samples)``, so that the Gram matrix of a reference is
computed once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from slm_plugin.errors import CalibrationError, NumericalError
from slm_plugin.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Estimator = Literal["biased", "unbiased"]
# With three samples the unbiased estimator divides by zero.
FEWEST_SAMPLES = 4
# Features converted to float64 at a time, to limit memory.
_CHUNK = 1 << 16


def gram(features: Tensor) -> Tensor:
    """Inner products of the samples' centred features, in float64.

    CKA does not depend on the mean. Removing it here keeps precision, because hidden states share a
    large mean.

    Args:
        features: ``(samples, ...)``.

    Returns:
        ``(samples, samples)``.

    Raises:
        NumericalError: A feature is NaN or infinite.
    """
    flat = features.flatten(1)
    total = torch.zeros(len(flat), len(flat), dtype=torch.float64, device=flat.device)
    for part in torch.split(flat, _CHUNK, dim=1):
        deviations = part.double() - part.double().mean(0)
        total += deviations @ deviations.T
    if not torch.isfinite(total).all():
        raise NumericalError(
            "CKA features are NaN or infinite",
            hint="load the model in float32 or bfloat16: float16 overflows",
        )
    return total


def gram_cka(reference: Tensor, other: Tensor, estimator: Estimator) -> Tensor:
    """CKA of two Gram matrices, ``(samples, samples)`` each, as one number.

    The biased estimator lies between 0 and 1, and tends to 1 for any two sets of features, related
    or not, when features outnumber samples. The unbiased one is 0 on average for unrelated
    features; a single estimate may fall below 0.

    Raises:
        CalibrationError: There are fewer than four samples and the estimator is unbiased.
        NumericalError: All samples are equal.

    Source: Kornblith et al. (arXiv 1905.00414), section 3, with linear kernels; the unbiased
    estimator of HSIC is that of Song et al. (JMLR 13, 2012), used for CKA by Nguyen et al.
    (arXiv 2010.15327), section 2.
    """
    return cka_matrix(torch.stack([reference, other]), estimator)[0, 1]


def cka_matrix(grams: Tensor, estimator: Estimator) -> Tensor:
    """CKA of every pair of Gram matrices.

    Args:
        grams: ``(sets, samples, samples)``.
        estimator: Biased or unbiased.

    Returns:
        ``(sets, sets)``, in float64, symmetric and 1 on the diagonal.

    Raises:
        CalibrationError: There are fewer than four samples and the estimator is unbiased.
        NumericalError: All samples of a set are equal.
    """
    flat = centred(grams, estimator).flatten(1)
    products = flat @ flat.T
    lengths = _lengths(products.diagonal())
    return products / torch.outer(lengths, lengths)


def chance_matrix(grams: Tensor) -> Tensor:
    """Expected biased CKA when the samples of one set are paired at random with the other's.

    This is the exact mean over all permutations; for the unbiased estimator it is 0.

    Args:
        grams: ``(sets, samples, samples)``.

    Returns:
        ``(sets, sets)``, in float64.

    Raises:
        NumericalError: All samples of a set are equal.

    Over all permutations every diagonal entry is paired with every other one, and the rows of a
    centred Gram matrix sum to 0, so the mean of ``tr(K P L P')`` is
    ``tr(K) tr(L) / (samples - 1)``.
    """
    central = centred(grams, "biased")
    traces = central.diagonal(dim1=-2, dim2=-1).sum(-1)
    shares = traces / _lengths(central.square().sum((-2, -1)))
    return torch.outer(shares, shares) / (grams.shape[-1] - 1)


def centred(grams: Tensor, estimator: Estimator) -> Tensor:
    """Centred Gram matrices, whose inner product is HSIC up to a factor of the sample count.

    The unbiased HSIC of Song et al. is the inner product of "U-centred" matrices: diagonal zero,
    and every row of the others sums to 0.

    Args:
        grams: ``(..., samples, samples)``, symmetric.
        estimator: Biased or unbiased.

    Raises:
        CalibrationError: There are fewer than four samples and the estimator is unbiased.

    Source: Székely and Rizzo, "Partial distance correlation" (arXiv 1310.2926), section 2.
    """
    samples = grams.shape[-1]
    if estimator == "biased":
        rows = grams.mean(-1, keepdim=True)
        return grams - rows - rows.mT + rows.mean(-2, keepdim=True)
    if samples < FEWEST_SAMPLES:
        raise CalibrationError(
            f"unbiased CKA needs {FEWEST_SAMPLES} samples or more; there are {samples}",
            hint="draw more calibration samples",
        )
    off = grams - torch.diag_embed(grams.diagonal(dim1=-2, dim2=-1))
    rows = off.sum(-1, keepdim=True)
    whole = rows.sum(-2, keepdim=True)
    level = off - (rows + rows.mT) / (samples - 2) + whole / ((samples - 1) * (samples - 2))
    return level - torch.diag_embed(level.diagonal(dim1=-2, dim2=-1))


def _lengths(squares: Tensor) -> Tensor:
    if not (squares > 0).all():
        raise NumericalError(
            "CKA is not defined: all samples have the same features",
            hint="calibrate on samples that differ",
        )
    return squares.sqrt()
