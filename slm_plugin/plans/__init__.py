"""Pruning plans as data: operations, scores and resulting dimensions; surgery applies them."""

from slm_plugin.plans.plan import (
    ConcatLayers,
    DepthOperation,
    DropLayers,
    DropSublayers,
    KeepChannels,
    KeepHeads,
    LayerOperation,
    LayerPart,
    LayerScores,
    MergeLayers,
    Operation,
    PruningPlan,
    Trial,
    UnitScores,
)

__all__ = [
    "ConcatLayers",
    "DepthOperation",
    "DropLayers",
    "DropSublayers",
    "KeepChannels",
    "KeepHeads",
    "LayerOperation",
    "LayerPart",
    "LayerScores",
    "MergeLayers",
    "Operation",
    "PruningPlan",
    "Trial",
    "UnitScores",
]
