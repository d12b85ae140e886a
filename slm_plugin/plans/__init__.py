"""Pruning plans as data: operations, scores and resulting dimensions; surgery applies them."""

from slm_plugin.plans.operations import (
    ConcatLayers,
    DepthOperation,
    DropLayers,
    DropSublayers,
    KeepChannels,
    KeepExperts,
    KeepHeads,
    KeepHidden,
    KeepQueryHeads,
    LayerPart,
    MergeLayers,
    Operation,
    RotateHidden,
    WidthOperation,
)
from slm_plugin.plans.plan import FrontierShape, LayerScores, PruningPlan, Trial, UnitScores

__all__ = [
    "ConcatLayers",
    "DepthOperation",
    "DropLayers",
    "DropSublayers",
    "FrontierShape",
    "KeepChannels",
    "KeepExperts",
    "KeepHeads",
    "KeepHidden",
    "KeepQueryHeads",
    "LayerPart",
    "LayerScores",
    "MergeLayers",
    "Operation",
    "PruningPlan",
    "RotateHidden",
    "Trial",
    "UnitScores",
    "WidthOperation",
]
