"""Relative sparsity from how little a layer changes the hidden states."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_plugin.pruners.influence import block_influence
from slm_plugin.pruners.layer_sparsity.scaling import scaled

if TYPE_CHECKING:
    from slm_plugin.session import Session

_HALVINGS = 100


def layer_redundancy(session: Session, spread: float) -> list[float]:
    """Relative sparsity ``b + (1 - b) * LR / mean(LR)``, with ``b = 1 - spread``.

    LR is the mean cosine of a layer's input and output, scaled to 0..1 over the layers. The mean
    over the layers is 1.

    Args:
        session: The session.
        spread: The part of the sparsity that follows the redundancy; every layer has the rest.

    Raises:
        CalibrationError: There is no calibration set.
        NumericalError: A hidden state is NaN or zero.

    Source: Dumitru et al. 2024, Dynamic Slicing (arXiv 2411.03513), section 3, whose slice base is
        ``b`` times the mean slice.
    """
    found = scaled([-change for change in block_influence(session.view, session.captured())])
    mean = sum(found) / len(found)
    return [1 - spread + spread * place / mean for place in found]


def influence(session: Session, spread: float) -> list[float]:
    """Relative sparsity ``layers * softmax(-BI / eps)``, BI the block influence of the layers.

    These values minimise the sum of ``sparsity * BI`` less eps times their entropy, at a mean of 1.

    Args:
        session: The session.
        spread: The layer of the largest influence gets ``1 - spread``, which determines eps.

    Raises:
        CalibrationError: There is no calibration set.
        NumericalError: A hidden state is NaN or zero.

    Source: Lin et al. 2024, MoDeGPT (arXiv 2408.09632), global sparsity allocation; there with eps
        given.
    """
    return softmax_shares(block_influence(session.view, session.captured()), spread)


def softmax_shares(influences: Sequence[float], spread: float) -> list[float]:
    """See `influence`."""
    low, high = 0.0, 1.0

    def shares(sharpness: float) -> list[float]:
        least = min(influences)
        powers = [math.exp(-sharpness * (one - least)) for one in influences]
        return [len(powers) * power / sum(powers) for power in powers]

    if max(influences) <= min(influences):
        return [1.0] * len(influences)
    while min(shares(high)) > 1 - spread:
        high *= 2
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if min(shares(middle)) > 1 - spread:
            low = middle
        else:
            high = middle
    return shares(low)
