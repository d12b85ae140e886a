"""Scores of the units of one layer by their names, for channels and for heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from slm_plugin.models.dimensions import Dimensions
from slm_plugin.pruners.input_sums import ReaderInputs
from slm_plugin.pruners.width import input_scores
from slm_plugin.pruners.width.brain_surgeon import error_curve
from slm_plugin.pruners.width.budget import Cut
from slm_plugin.pruners.width.heads import counted_units

if TYPE_CHECKING:
    from torch import Tensor

# Scores of single columns of the projections that read the units.
BY_COLUMN: dict[str, Callable[[ReaderInputs], Tensor]] = {
    "activation": input_scores.activation,
    "flap": input_scores.flap,
    "leverage": input_scores.leverage,
    # The scores from which its probabilities start.
    "policy_gradient": input_scores.wanda_sp,
    "wanda_sp": input_scores.wanda_sp,
}


def channel_scores(score: str, inputs: ReaderInputs, removed: int) -> Tensor:
    """Scores of MLP channels, ``(channels,)``.

    Args:
        score: Name of a score of what a layer computes.
        inputs: The inputs of ``down_proj``.
        removed: Number of channels that will go.
    """
    if score == "obs":
        return error_curve(inputs, removed, size=1)
    if score == "contribution":
        return input_scores.contribution(inputs, removed)
    return BY_COLUMN[score](inputs)


def head_scores(score: str, inputs: ReaderInputs, cut: Cut, dimensions: Dimensions) -> Tensor:
    """Scores of KV groups or query heads, ``(heads,)``: of all their columns, or the sum over them.

    Args:
        score: Name of a score of what a layer computes.
        inputs: The inputs of ``o_proj``.
        cut: What will go, some heads among it.
        dimensions: Sizes of the decoder.
    """
    _, _, size = counted_units(cut.heads or "kv_group", dimensions)
    if score == "obs":
        parts = dimensions.kv_heads if cut.query_heads else 1
        removed = parts * (cut.query_heads or cut.kv_groups)
        return error_curve(inputs, removed, size, parts)
    if score == "contribution":
        return input_scores.group_contribution(inputs, size)
    return BY_COLUMN[score](inputs).reshape(-1, size).sum(1)
