"""What the operations of a plan come to, worked out once for pictures and words."""

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


def destinations(plan: PruningPlan) -> list[int | None]:
    """Index in the result of every original layer; None for a layer that is dropped.

    A layer of which one block is left is where that block is.
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
    """MLP channels that stay, for every layer that loses some."""
    return {op.layer: op.indices for op in plan.operations if isinstance(op, KeepChannels)}


def kept_groups(plan: PruningPlan) -> dict[int, tuple[int, ...]]:
    """KV groups that stay, for every layer that loses some."""
    return {op.layer: op.kv_groups for op in plan.operations if isinstance(op, KeepHeads)}


def final_trials(plan: PruningPlan) -> set[int]:
    """Positions of the trials that the plan carries out: the last accepted one of each window.

    Of blocks that go two by two, each accepted trial was a step.
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
    """Layers of the model that a trial evaluated."""
    windows = [*trial.committed, (trial.first, trial.last)]
    if trial.layers_removed is not None:
        return plan.before.layers - trial.layers_removed
    # Otherwise what was done before was of the same kind.
    stays = 0 if trial.rule == DROP else 1
    return plan.before.layers - sum(last - first + 1 - stays for first, last in windows)
