"""The length of the residual stream behind a gap, against that of the dense model.

Source: Prune&Comp (arXiv 2507.18212).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from slm_plugin.errors import NumericalError
from slm_plugin.lazy import torch
from slm_plugin.models.families.family import Family
from slm_plugin.restoration.layer_walk import LayerBatch


@dataclass(frozen=True, slots=True)
class Gap:
    """What a gap does to the length of the residual stream.

    Attributes:
        factor: The mean ratio of lengths, target to state.
        before: Relative error of the states.
        after: That of the states times the factor.
    """

    factor: float
    before: float
    after: float

    def describe(self) -> str:
        """Factor and errors in words."""
        return f"length times {self.factor:.4g}, error {self.before:.2%} to {self.after:.2%}"


def unscalable(family: Family) -> str:
    """Why a stream cannot be scaled by the weights that write to it; empty where it can."""
    if family.norm_behind:
        return "a norm stands behind each block and cancels the factor of its weights"
    if family.rotary == "none":
        return "its learned positions enter the stream beside the embedding, and are not scaled"
    if family.tower is not None:
        return "features of images enter the stream beside the embedding, and are not scaled"
    return ""


def measured_gap(batches: Iterable[LayerBatch], where: str) -> Gap:
    """The mean over all tokens of |X*| / |X|, and the errors without and with this factor.

    Args:
        batches: States behind the gap with their targets.
        where: The gap, for messages.

    Raises:
        NumericalError: States are NaN, infinite or zero.
    """
    ratios = tokens = 0.0
    # Squared norm of the state, its product with the target, squared norm of the target.
    squares = torch.zeros(3, dtype=torch.float64)
    for batch in batches:
        now, wanted = batch.output.cpu().double(), batch.target.cpu().double()
        ratios += float((wanted.norm(dim=-1) / now.norm(dim=-1)).sum())
        tokens += now[..., 0].numel()
        squares += torch.stack([now.square().sum(), (now * wanted).sum(), wanted.square().sum()])
    factor = ratios / tokens
    if not (math.isfinite(factor) and factor > 0):
        raise NumericalError(
            f"the states behind {where} are NaN, infinite or zero",
            hint="load the model in float32 or bfloat16 and check its weights",
        )

    def error(scale: float) -> float:
        weights = torch.tensor([scale * scale, -2 * scale, 1.0], dtype=torch.float64)
        return math.sqrt(float((weights @ squares).clamp_min(0) / squares[2]))

    return Gap(factor, error(1.0), error(factor))
