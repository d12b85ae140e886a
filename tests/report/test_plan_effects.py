"""What the operations of a plan come to."""

from __future__ import annotations

import random

from slm_plugin.plans import DropLayers, MergeLayers, Operation, Trial
from slm_plugin.report import plan_effects
from tests.report import sample_plans


def by_surgery(layers: int, operations: list[Operation]) -> list[int | None]:
    """Where layers end up, by cutting a list of the original layers that each place holds."""
    model = [[layer] for layer in range(layers)]
    for op in operations:
        if isinstance(op, MergeLayers):
            held = [place for place in model if op.first <= place[0] <= op.last]
            start = model.index(held[0])
            model[start : start + len(held)] = [[layer for place in held for layer in place]]
    removed = {i for op in operations if isinstance(op, DropLayers) for i in op.indices}
    model = [place for place in model if not removed & set(place)]
    homes = {layer: home for home, place in enumerate(model) for layer in place}
    return [homes.get(layer) for layer in range(layers)]


def test_destinations_agree_with_cutting_a_list() -> None:
    """Merges and drops in any order send every layer where surgery on a list sends it."""
    dice = random.Random(5)
    for _ in range(50):
        cuts = sorted(dice.sample(range(30), 6))
        operations: list[Operation] = [
            MergeLayers(first=cuts[0], last=cuts[1]),
            MergeLayers(first=cuts[2], last=cuts[3]),
            DropLayers(indices=tuple(cuts[4:])),
        ]
        dice.shuffle(operations)
        plan = sample_plans.depth_plan(operations=tuple(operations))
        assert plan_effects.layer_mapping(plan) == by_surgery(30, operations)


def test_final_trials_are_those_whose_windows_are_merged() -> None:
    """Growing windows were accepted on the way; only the last of each is the plan's."""
    plan = sample_plans.depth_plan()
    final = [plan.trials[i] for i in sorted(plan_effects.final_trials(plan))]
    assert sorted((t.first, t.last) for t in final) == [(17, 18), (24, 26)]
    assert sum(trial.accepted for trial in plan.trials) == 3


def test_a_rejected_repetition_is_not_the_final_trial() -> None:
    """A window that was merged and evaluated again later belongs to the trial that accepted it."""
    plan = sample_plans.depth_plan()
    again = Trial(first=24, last=26, similarity=0.1, accepted=False)
    longer = plan.model_copy(update={"trials": (*plan.trials, again)})
    assert plan_effects.final_trials(longer) == plan_effects.final_trials(plan)


def test_kept_units_are_read_by_layer() -> None:
    """Every layer of the sample keeps 1360 channels and 2 KV groups."""
    plan = sample_plans.width_plan()
    assert {k: len(v) for k, v in plan_effects.kept_channels(plan).items()} == dict.fromkeys(
        range(27), 1360
    )
    assert {k: len(v) for k, v in plan_effects.kept_groups(plan).items()} == dict.fromkeys(
        range(27), 2
    )


def test_dropped_layers_count_once_each() -> None:
    """The plan's drops are its final trials."""
    plan = sample_plans.searching_plan()
    assert plan_effects.final_trials(plan) == {0, 1}
