"""Effects of a plan's operations, computed once for plots and text."""

from __future__ import annotations

from slm_plugin.plans import DropSublayers, PruningPlan, layout, steps
from slm_plugin.plans.operations import by_kind


def layer_mapping(plan: PruningPlan) -> list[int | None]:
    """The layer mapping: new index of every original layer, None for a dropped one."""
    return layout.layer_mapping(by_kind(plan.operations)[0], plan.before.layers)


def remaining_layers(plan: PruningPlan) -> list[int]:
    """For every layer left, the lowest of the original layers in it."""
    return steps.remaining_layers(by_kind(plan.operations)[0], plan.before.layers)


def kept_channels(plan: PruningPlan) -> dict[int, tuple[int, ...]]:
    """Remaining MLP channels of every layer that loses some."""
    return _kept(plan, "channels")


def kept_groups(plan: PruningPlan) -> dict[int, tuple[int, ...]]:
    """Remaining KV groups of every layer that loses some."""
    return _kept(plan, "kv_groups")


def kept_query_heads(plan: PruningPlan) -> dict[int, tuple[int, ...]]:
    """Remaining query heads of every layer that loses some without their KV group."""
    return _kept(plan, "query_heads")


def kept_experts(plan: PruningPlan) -> dict[int, tuple[int, ...]]:
    """Remaining experts of every layer that loses some."""
    return _kept(plan, "experts")


def _kept(plan: PruningPlan, unit: str) -> dict[int, tuple[int, ...]]:
    return {op.layer: op.kept for op in by_kind(plan.operations)[1] if op.unit == unit}


def final_trials(plan: PruningPlan) -> set[int]:
    """Positions of the trials behind the plan: the last accepted one of each window.

    For dropped attention and MLP blocks every accepted trial is one of them.
    """
    if any(isinstance(op, DropSublayers) for op in plan.operations):
        return {i for i, trial in enumerate(plan.trials) if trial.accepted}
    windows: set[tuple[int, int]] = set()
    for op in by_kind(plan.operations)[0]:
        windows |= {op.merged} if op.merged else {(block.layer, block.layer) for block in op.used()}
    last = {
        (trial.first, trial.last): position
        for position, trial in enumerate(plan.trials)
        if trial.accepted
    }
    return {position for window, position in last.items() if window in windows}
