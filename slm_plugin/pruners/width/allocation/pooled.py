"""Relative sparsity from one threshold over the channels of all layers."""

from __future__ import annotations

from collections.abc import Sequence

from slm_plugin.lazy import torch
from slm_plugin.plans import UnitScores
from slm_plugin.pruners.width.importance import standardised


def pooled(scores: Sequence[UnitScores], removed: int) -> list[float]:
    """Share of each layer's channels that is among the lowest of the whole model.

    The scores of each layer are standardised to mean 0 and deviation 1, so that layers of large
    values do not keep everything. All channels have the same number of parameters, so no score has
    to be divided by a cost.

    Args:
        scores: Scores of MLP channels, one entry per layer.
        removed: Number of channels of the model to remove.

    Returns:
        For every layer, the share of its channels below the threshold.

    Source: FLAP (An et al. 2024, arXiv 2312.11983), section 3.3, adaptive structure search.
    """
    standard = [standardised(one.scores) for one in scores]
    owners = torch.cat([torch.full((len(one),), layer) for layer, one in enumerate(standard)])
    lowest = torch.cat(standard).argsort(stable=True)[:removed]
    counts = torch.bincount(owners[lowest], minlength=len(standard))
    return [count / len(one.scores) for count, one in zip(counts.tolist(), scores, strict=True)]
