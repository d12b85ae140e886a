"""Effects of a plan's operations, computed once for plots and text."""

from __future__ import annotations

from slm_plugin.plans import (
    ConcatLayers,
    DropLayers,
    DropSublayers,
    KeepChannels,
    KeepHeads,
    MergeLayers,
    PruningPlan,
    Trial,
)
from slm_plugin.pruners.depth.search.runs import DROP
from slm_plugin.surgery.composition import pairs_left


def layer_mapping(plan: PruningPlan) -> list[int | None]:
    """The layer mapping: new index of every original layer, None for a dropped one.

    A layer with one remaining block maps to the layer with that block.
    """
    blocks = [op for op in plan.operations if isinstance(op, DropSublayers)]
    if blocks:
        pairs = pairs_left(blocks, plan.before.layers)
        home = {layer: position for position, pair in enumerate(pairs) for layer in pair}
        return [home.get(layer) for layer in range(plan.before.layers)]
    dropped = {i for op in plan.operations if isinstance(op, DropLayers) for i in op.indices}
    into = list(range(plan.before.layers))
    for op in plan.operations:
        if isinstance(op, MergeLayers | ConcatLayers):
            into[op.first : op.last + 1] = [op.first] * (op.last - op.first + 1)
    survivors = sorted({home for home in into if home not in dropped})
    place = {home: position for position, home in enumerate(survivors)}
    return [place.get(home) for home in into]


def kept_channels(plan: PruningPlan) -> dict[int, tuple[int, ...]]:
    """Remaining MLP channels of every layer that loses some."""
    return {op.layer: op.indices for op in plan.operations if isinstance(op, KeepChannels)}


def kept_groups(plan: PruningPlan) -> dict[int, tuple[int, ...]]:
    """Remaining KV groups of every layer that loses some."""
    return {op.layer: op.kv_groups for op in plan.operations if isinstance(op, KeepHeads)}


def final_trials(plan: PruningPlan) -> set[int]:
    """Positions of the trials behind the plan: the last accepted one of each window.

    For dropped attention and MLP blocks every accepted trial is one of them.
    """
    if any(isinstance(op, DropSublayers) for op in plan.operations):
        return {i for i, trial in enumerate(plan.trials) if trial.accepted}
    windows = {(op.first, op.last) for op in plan.operations if isinstance(op, MergeLayers)}
    windows |= {(i, i) for op in plan.operations if isinstance(op, DropLayers) for i in op.indices}
    last = {
        (trial.first, trial.last): position
        for position, trial in enumerate(plan.trials)
        if trial.accepted
    }
    return {position for window, position in last.items() if window in windows}


def layers_left(plan: PruningPlan, trial: Trial) -> int:
    """Number of layers of the model that a trial evaluated."""
    windows = [*trial.committed, (trial.first, trial.last)]
    if trial.layers_removed is not None:
        return plan.before.layers - trial.layers_removed
    # Otherwise all runs of the trial are of the same kind.
    remaining = 0 if trial.rule == DROP else 1
    return plan.before.layers - sum(last - first + 1 - remaining for first, last in windows)
