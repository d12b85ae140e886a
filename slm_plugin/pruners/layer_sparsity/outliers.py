"""Relative sparsity from the share of outliers in a layer (OWL)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slm_plugin.pruners.input_sums import InputSums, LayerInputs, layer_inputs
from slm_plugin.pruners.layer_sparsity.scaling import scaled

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session

# How many times the mean an outlier exceeds; the M of the paper, 5 in most of its settings.
OUTLIER = 5.0
# Maps that read what another one reads, so that it is computed once.
SHARED = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}


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
    shares = scaled([outlier_share(_saliences(layer)) for layer in layer_inputs(session)])
    mean = sum(shares) / len(shares)
    return [1 - 2 * spread * (share - mean) for share in shares]


def outlier_share(saliences: list[Tensor]) -> float:
    """Share of the entries of some matrices that exceed OUTLIER times the mean of them all."""
    count = sum(one.numel() for one in saliences)
    mean = sum(float(one.sum()) for one in saliences) / count
    return sum(int((one > OUTLIER * mean).sum()) for one in saliences) / count


def _saliences(layer: LayerInputs) -> list[Tensor]:
    """``|W_ij| * ||x_j||`` over all tokens for every map, in its weight's shape, float64."""
    norms: dict[str, Tensor] = {}
    found = []
    for name in layer.projections:
        inputs = layer.read_by(name)
        source = SHARED.get(name, name)
        if source not in norms:
            norms[source] = InputSums(inputs).squares.sqrt()
        weight = inputs.weight.abs()
        found.append(weight * norms[source].to(weight.device))
    return found
