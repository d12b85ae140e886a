"""Relative sparsity from the share of outliers in a layer (OWL)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slm_plugin.pruners.width.allocation.scaling import scaled
from slm_plugin.pruners.width.input_sums import InputSums, ReaderInputs, reader_inputs

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session

# How many times the mean an outlier exceeds; the M of the paper, 5 in most of its settings.
OUTLIER = 5.0


def owl(session: Session, spread: float) -> list[float]:
    """Relative sparsity ``1 - 2 * spread * (u - mean(u))``, u the layer's outliers, scaled to 0..1.

    A layer's outliers are the share of the values ``|W_ij| * ||x_j||`` of all its linear maps that
    exceed OUTLIER times their mean.

    Args:
        session: The session.
        spread: Half the distance between the largest and the smallest value.

    Raises:
        CalibrationError: There is no calibration set.
        NumericalError: The model produces NaN or infinity.

    Source: Yin et al. 2024, OWL (arXiv 2310.05175), section 4, with spread for lambda divided by
        the mean sparsity.
    """
    every = [reader_inputs(session, name) for name in session.view.family.projections]
    shares = scaled([outlier_share(list(map(_salience, one))) for one in zip(*every, strict=True)])
    mean = sum(shares) / len(shares)
    return [1 - 2 * spread * (share - mean) for share in shares]


def outlier_share(saliences: list[Tensor]) -> float:
    """Share of the entries of some matrices that exceed OUTLIER times the mean of them all."""
    count = sum(one.numel() for one in saliences)
    mean = sum(float(one.sum()) for one in saliences) / count
    return sum(int((one > OUTLIER * mean).sum()) for one in saliences) / count


def _salience(inputs: ReaderInputs) -> Tensor:
    """``|W_ij| * ||x_j||`` over all tokens, in the weight's shape, float64."""
    weight = inputs.weight.abs()
    return weight * InputSums(inputs).squares.sqrt().to(weight.device)
