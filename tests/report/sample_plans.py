"""Plans for a model shaped like SmolLM2-135M, written by hand: no model is made."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import cache
from typing import Any

from slm_plugin.models.fingerprint import Fingerprint
from slm_plugin.plans import (
    DropLayers,
    FrontierShape,
    KeepChannels,
    KeepHeads,
    MergeLayers,
    Operation,
    PruningPlan,
    Trial,
    UnitScores,
)
from slm_plugin.target import Target
from tests.tiny import SMOLLM2

ORIGINAL = SMOLLM2
SHALLOW = ORIGINAL.without_layers(3)
NARROW = SHALLOW.without_units(channels=176, kv_groups=1)
DEPTH_FILE, WIDTH_FILE = "plans/1-slm.json", "plans/2-torch_pruning.json"


def identity(letter: str) -> Fingerprint:
    """A fingerprint that nothing has."""
    return Fingerprint(
        architecture="LlamaForCausalLM", dtype="float32", weights=f"sha256:{letter * 64}"
    )


def slide(
    layers: int, threshold: float, similarity: Callable[[list[tuple[int, int]]], float]
) -> tuple[list[Trial], list[tuple[int, int]]]:
    """The walk of a growing window from the top: its trials and the windows that it merges."""
    trials: list[Trial] = []
    merged: list[tuple[int, int]] = []
    high = layers - 2
    low = high - 1
    while low >= 1:
        value = round(similarity([*merged, (low, high)]), 4)
        accepted = value > threshold
        trials.append(
            Trial(
                first=low, last=high, committed=tuple(merged), similarity=value, accepted=accepted
            )
        )
        if accepted:
            low -= 1
        elif low + 1 < high:
            merged.append((low + 1, high))
            high = low
            low = high - 1
        else:
            high, low = high - 1, low - 1
    return trials, merged


def cost_of(windows: list[tuple[int, int]]) -> float:
    """An invented similarity: middle layers are cheap, the lowest ones dear."""
    dice = random.Random(repr(windows))
    price = {16: 0.004, 17: 0.006, 24: 0.01, 25: 0.012}
    kept = 0.99
    for first, last in windows:
        for layer in range(first, last):
            kept -= price.get(layer, 0.14 + 0.006 * abs(layer - 16)) + dice.uniform(0, 0.03)
    return kept


def depth_plan(**changes: Any) -> PruningPlan:
    """Three layers of thirty go, merged in two windows after some thirty trials."""
    trials, windows = slide(30, 0.9, cost_of)
    fields: dict[str, Any] = {
        "pruner": "slm",
        "kind": "depth",
        "options": {"merge_rule": "telescoped", "criterion": "flat_cosine"},
        "target": Target(threshold=0.9),
        "fingerprint": identity("a"),
        "before": ORIGINAL,
        "after": ORIGINAL.without_layers(sum(last - first for first, last in windows)),
        "operations": tuple(MergeLayers(first=a, last=b) for a, b in windows),
        "threshold": 0.9,
        "trials": tuple(trials),
        "notes": ("the top layer takes no part in the walk",),
        "warnings": ("a similarity above 0.9 says little about perplexity on this model",),
    }
    return PruningPlan(**{**fields, **changes})


def dropping_plan() -> PruningPlan:
    """A plan that both merges and drops: layers 4 to 6 become one, 9 and 20 go."""
    operations: tuple[Operation, ...] = (
        MergeLayers(first=4, last=6),
        DropLayers(indices=(9, 20)),
    )
    return depth_plan(
        operations=operations,
        target=Target(layers_removed=4),
        after=ORIGINAL.without_layers(4),
        trials=(),
        threshold=None,
    )


def searching_plan() -> PruningPlan:
    """Layers 20 and 9 were dropped one after the other, each after a trial."""
    trials = (
        Trial(first=20, last=20, rule="drop", similarity=-0.12, accepted=True),
        Trial(
            first=9,
            last=9,
            rule="drop",
            committed=((20, 20),),
            similarity=-0.31,
            accepted=True,
        ),
    )
    return depth_plan(
        pruner="sleb",
        operations=(DropLayers(indices=(20,)), DropLayers(indices=(9,))),
        target=Target(layers_removed=2),
        after=ORIGINAL.without_layers(2),
        trials=trials,
        threshold=None,
    )


@cache
def width_plan(layers: int = SHALLOW.layers) -> PruningPlan:
    """Layers lose 176 of 1536 MLP channels and one of three KV groups each.

    Fewer than the run's 27 layers make a quicker picture.
    """
    dice = random.Random(0)
    operations: list[Operation] = []
    scores: list[UnitScores] = []
    for layer in range(layers):
        for unit, total, stay in (("mlp_channel", 1536, 1360), ("kv_group", 3, 2)):
            level = 0.4 + 0.05 * layer
            drawn = [dice.lognormvariate(0, 0.5) * level for _ in range(total)]
            values = tuple(round(value, 5) for value in drawn)
            best = sorted(sorted(range(total), key=lambda i: -values[i])[:stay])
            scores.append(
                UnitScores.model_validate({"layer": layer, "unit": unit, "scores": values})
            )
            if unit == "mlp_channel":
                operations.append(KeepChannels(layer=layer, indices=tuple(best)))
            else:
                operations.append(KeepHeads(layer=layer, kv_groups=tuple(best)))
    return PruningPlan(
        pruner="torch_pruning",
        kind="width",
        options={"importance": "taylor", "round_to": 8},
        target=Target(ratio=0.1),
        fingerprint=identity("b"),
        before=SHALLOW.without_layers(SHALLOW.layers - layers),
        after=NARROW.without_layers(NARROW.layers - layers),
        operations=tuple(operations),
        scores=tuple(scores),
        notes=("1360 channels is the multiple of 8 nearest to the target",),
        warnings=("6 attention heads do not divide hidden size 576 into heads of 64",),
    )


def hybrid_plan() -> PruningPlan:
    """Layers 4 to 6 become one, 9 goes, and those that are left keep two of three KV groups."""
    depth = (MergeLayers(first=4, last=6), DropLayers(indices=(9,)))
    left = [layer for layer in range(30) if layer not in (5, 6, 9)]
    return depth_plan(
        pruner="planner",
        kind="hybrid",
        options={},
        operations=(*depth, *(KeepHeads(layer=layer, kv_groups=(0, 2)) for layer in left)),
        target=Target(ratio=0.15),
        after=ORIGINAL.without_layers(3).without_units(kv_groups=1),
        trials=(),
        threshold=None,
        loss_before=3.25,
        loss_after=4.125,
    )


def planned_shape() -> PruningPlan:
    """The hybrid plan as a planner's, which chose the second of three shapes and measured two."""
    shapes = [(30, 1200, None), (27, 1536, 0.41), (28, 1400, 0.5)]
    frontier = tuple(
        FrontierShape(
            layers=layers,
            mlp_width=width,
            kv_groups=2,
            parameters=113_000_000,
            cost=0.85,
            predicted=0.45,
            measured=measured,
            chosen=measured == 0.41,
        )
        for layers, width, measured in shapes
    )
    return hybrid_plan().model_copy(update={"frontier": frontier, "adherence": 0.99})


def plans() -> dict[str, PruningPlan]:
    """The plans of the run by file, as the report names them."""
    return {DEPTH_FILE: depth_plan(), WIDTH_FILE: width_plan()}
