"""The planner with a width for every layer: the programme, its costs, and its plans."""

from __future__ import annotations

import copy
import itertools
import random
import re
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from slm_plugin import Recipe
from slm_plugin.cache import Store
from slm_plugin.errors import MissingExtraError, RecipeError, TargetError
from slm_plugin.plans import DropLayers, KeepChannels, PruningPlan, UnitScores
from slm_plugin.plans.operations import by_kind
from slm_plugin.pruners.depth.search.repaired_stack import REPAIRS
from slm_plugin.pruners.hybrid.allotment import Allotment, allotments
from slm_plugin.pruners.hybrid.budget import Budget, memory_budget, parameter_budget, time_budget
from slm_plugin.pruners.hybrid.hybrid import Hybrid, HybridOptions
from slm_plugin.pruners.hybrid.increases import layer_increases
from slm_plugin.pruners.hybrid.integer import operations_for
from slm_plugin.pruners.hybrid.programme import cheapest
from slm_plugin.pruners.hybrid.range import Range
from slm_plugin.pruners.hybrid.shapes import MixedShape
from slm_plugin.pruners.hybrid.workload import Workload
from slm_plugin.pruners.width.budget import Cut
from slm_plugin.pruners.width.width import Width
from slm_plugin.pruners.width.width_options import WidthOptions
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.pruners.hybrid.test_hybrid import changed_by, restored, session_of, timed
from tests.recovery.pruned import TOKENS
from tests.tiny import make_model

Increases = list[dict[int, float]]
RATIO = Target(ratio=0.2)


def planned(session: Session, target: Target = RATIO, **options: Any) -> PruningPlan:
    """The plan of the integer programme."""
    asked = HybridOptions(search="integer", multiple_of=4, **options)
    return session.plan(Hybrid(asked, target))


def widths_of(plan: PruningPlan) -> tuple[int, ...]:
    """The chosen width of every layer, 0 for one that goes."""
    (best,) = [shape for shape in plan.frontier if shape.chosen]
    assert best.widths is not None
    return best.widths


def magnitudes(session: Session) -> tuple[UnitScores, ...]:
    """Scores of the channels that ask for no data."""
    options = WidthOptions(score="magnitude", restore="none")
    return Width(options, RATIO).score(session, Cut(36, 0))


def budget_of(kind: str, share: float, layers: int, monkeypatch: pytest.MonkeyPatch) -> Budget:
    """A budget of each kind on a model whose layers have 48 channels."""
    session = Session(make_model(num_hidden_layers=layers))
    dense = session.view.dimensions()
    if kind == "parameters":
        return parameter_budget(Target(ratio=1 - share), dense, dense)
    if kind == "memory":
        whole = Workload().memory(dense, torch.float32)
        return memory_budget(Target(memory=int(share * whole)), dense, Workload(), torch.float32)
    monkeypatch.setattr("slm_plugin.pruners.hybrid.budget.measure", timed)
    target = Target(latency={"decode": share})
    return time_budget(session, target, Workload(), kv_groups=False)


def sizes_of(layers: int, multiple_of: int, removable: int) -> Range:
    """What layers of 48 channels may keep."""
    dense = Session(make_model(num_hidden_layers=layers)).view.dimensions()
    return Range.of(dense, removable, kv_groups=False, multiple_of=multiple_of)


def random_increases(seed: int, sizes: Range, removable: set[int]) -> Increases:
    """Losses that grow with what goes."""
    draw = random.Random(seed)
    made: Increases = []
    for layer in range(sizes.dense.layers):
        steps = sorted(draw.uniform(0, 0.3) for _ in sizes.widths[1:])
        found = dict(zip(sizes.widths, [0.0, *steps], strict=True))
        if layer in removable:
            found[0] = draw.uniform(0.05, 0.4)
        made.append(found)
    return made


def summed(widths: tuple[int, ...], increases: Increases) -> float:
    """The objective of the programme."""
    return sum(of[width] for of, width in zip(increases, widths, strict=True))


@pytest.mark.parametrize("kind", ["parameters", "memory", "latency"])
@pytest.mark.parametrize("share", [0.9, 0.75, 0.66])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_programme_is_brute_force(
    kind: str, share: float, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six layers of which each stays whole, keeps half of its channels or goes, the first two not.

    All 2 x 2 x 81 choices are compared, by a budget that counts each of them by its dimensions.
    """
    budget = budget_of(kind, share, 6, monkeypatch)
    sizes, removable = sizes_of(6, 24, 4), {2, 3, 4, 5}
    increases = random_increases(seed, sizes, removable)
    step = 24 * sizes.dense.channel_parameters
    costs = {}
    for widths in itertools.product(*(of for of in increases)):
        if sum(not width for width in widths) <= 3:
            costs[widths] = budget.cost(MixedShape(widths, 2))
    assert len(costs) > 250
    met = [
        widths
        for widths, cost in costs.items()
        if (cost <= budget.allowed if budget.limit else 2 * abs(cost - budget.allowed) <= step)
    ]
    solved = [cheapest(increases, allotment) for allotment in allotments(budget, sizes)]
    found = min((one for one in solved if one), key=lambda one: summed(one, increases))
    best = min(met, key=lambda one: summed(one, increases))
    assert found in met and found == best


@pytest.mark.parametrize("kind", ["parameters", "memory", "latency"])
@pytest.mark.parametrize("share", [0.97, 0.88, 0.71, 0.55])
def test_a_budget_is_used_and_not_exceeded(
    kind: str, share: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To one step of one layer; a size to half of that."""
    budget = budget_of(kind, share, 10, monkeypatch)
    sizes = sizes_of(10, 4, 10)
    increases = random_increases(7, sizes, {*range(10)})
    whole = MixedShape((48,) * 10, 2)
    step = budget.cost(whole) - budget.cost(MixedShape((48,) * 9 + (44,), 2))
    within = allotments(budget, sizes)
    assert [one.removed for one in within] == list(
        range(within[0].removed, within[0].removed + len(within))
    )
    for allotment in within:
        widths = cheapest(increases, allotment)
        assert widths is not None and widths.count(0) == allotment.removed <= 5
        left = [width for width in widths if width]
        assert all(width in sizes.widths for width in left)
        unused = budget.allowed - budget.cost(MixedShape(widths, 2))
        if budget.limit:
            assert 0 <= unused < step or {*left} == {48}
        else:
            assert 2 * abs(unused) <= step * (1 + 1e-9)


def test_ties_go_to_the_lower_layers() -> None:
    """And the same programme has the same solution however often it is solved."""
    increases: Increases = [{48: 0.0, 36: 0.1, 24: 0.2, 0: 0.3} for _ in range(8)]
    found = {cheapest(increases, Allotment(2, 252, 252)) for _ in range(3)}
    assert found == {(0, 0, 24, 36, 48, 48, 48, 48)} or found == {(0, 0, 36, 24, 48, 48, 48, 48)}
    assert cheapest(increases, Allotment(0, 8 * 48, 8 * 48)) == (48,) * 8
    assert cheapest(increases, Allotment(4, 5 * 48, 6 * 48)) is None


def test_widths_between_the_sizes_do_not_slip_through_the_tolerance() -> None:
    """Sums are whole numbers, however large they are."""
    increases: Increases = [{11008: 0.0, 11000: 1e-3 + layer * 1e-5} for layer in range(32)]
    most = 32 * 11008 - 8
    found = cheapest(increases, Allotment(0, most, most))
    assert found == (11000, *(11008,) * 31)
    assert cheapest(increases, Allotment(0, most + 1, most + 1)) is None


def test_increases_are_divergences_of_a_model_changed_by_hand(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the repair: channels set to zero, or a layer deleted, in the class's forward pass."""
    monkeypatch.setitem(REPAIRS, "boundary", None)
    session = session_of()
    model, before = session.model, session.view.dimensions()
    scores = Width(WidthOptions(score="magnitude", restore="none"), RATIO).score(
        session, Cut(36, 0)
    )
    sizes = [48, 36, 20, 18, 12]
    found = layer_increases(session, sizes, {2, 5}, scores, "boundary", Store())
    assert [sorted(of) for of in found] == [
        [0, *sizes[::-1]] if layer in (2, 5) else sizes[::-1] for layer in range(8)
    ]
    held = TOKENS[::5]

    def logs(given: torch.nn.Module) -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = given(held, use_cache=False).logits
        return out.double().log_softmax(-1)

    original = logs(model)
    for layer, width in [(0, 36), (4, 18), (2, 0), (5, 0)]:
        changed = copy.deepcopy(model)
        if width:
            shape = MixedShape(tuple(width if i == layer else 48 for i in range(8)), 2)
            (kept,) = (
                one
                for one in operations_for(shape, before, found, scores)
                if isinstance(one, KeepChannels) and one.layer == layer
            )
            gone = [i for i in range(48) if i not in kept.indices]
            changed.model.layers[layer].mlp.down_proj.weight.data[:, gone] = 0
        else:
            del changed.model.layers[layer]
        expected = (original.exp() * (original - logs(changed))).sum(-1).mean()
        assert found[layer][width] == pytest.approx(float(expected), rel=1e-4)
    # A power of what goes, through the two that are measured.
    for of in found:
        (low, high), between = (of[36], of[18]), of[20]
        assert low < between < high and of[48] == 0 and of[12] > high


def test_the_repair_lowers_what_a_layer_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a model whose layer repeats what the one below it adds: it costs nothing after the fit."""
    model = make_model(num_hidden_layers=8)
    layer = model.model.layers[4]
    layer.self_attn.o_proj.weight.data.zero_()
    layer.mlp.down_proj.weight.data.zero_()
    session = Session(model, calibration=TOKENS)
    found = layer_increases(session, [48], {3, 4, 5}, (), "boundary", Store())
    assert found[4][0] == pytest.approx(0, abs=1e-6) and min(found[3][0], found[5][0]) > 1e-4
    monkeypatch.setitem(REPAIRS, "boundary", None)
    plain = layer_increases(session, [48], {3, 4, 5}, (), "boundary", Store())
    assert found[3][0] < plain[3][0]


def dead(layer: int) -> Session:
    """A model one of whose MLPs adds nothing."""
    model = make_model(num_hidden_layers=8)
    model.model.layers[layer].mlp.down_proj.weight.data.zero_()
    session = Session(model, calibration=TOKENS)
    session.keep_reference()
    return session


def test_channels_that_do_nothing_go_first() -> None:
    """As long as they are enough, nothing else goes, and the loss stays."""
    plan = planned(dead(5), Target(ratio=0.04), verify=1)
    widths = widths_of(plan)
    assert widths[5] == 20 and widths[:5] + widths[6:] == (48,) * 7
    (best,) = [shape for shape in plan.frontier if shape.chosen]
    assert best.predicted == pytest.approx(0, abs=1e-4)
    wider = widths_of(planned(dead(2), Target(ratio=0.1), verify=1))
    assert wider[2] == 12 == min(wider)


@pytest.mark.parametrize("family", ["llama", "gemma3", "phi3", "qwen3"])
def test_what_is_measured_is_the_pruned_and_refitted_model(family: str) -> None:
    """As surgery and the recovery leave it; the model has the widths that the plan names."""
    session = session_of(family)
    plan = planned(session, Target(ratio=0.25), verify=2)
    assert PruningPlan.parse(plan.to_json()) == plan
    (best,) = [shape for shape in plan.frontier if shape.chosen]
    left = tuple(width for width in widths_of(plan) if width)
    assert plan.after.widths == left and best.layers == len(left) and best.mlp_width == max(left)
    assert best.parameters == plan.after.parameters
    found = changed_by(session, lambda: restored(session, plan))
    assert session.view.dimensions() == plan.after
    assert best.measured == pytest.approx(fmean(found), abs=1e-7)


def test_a_plan_is_ordinary_operations_and_says_what_it_needs() -> None:
    """Layers go first, every layer left is named, and no stock class holds the result."""
    plan = planned(session_of(), Target(ratio=0.35), verify=9)
    assert all(shape.measured is not None for shape in plan.frontier)
    best = min(plan.frontier, key=lambda shape: shape.measured or 0)
    assert best.chosen and (plan.adherence or 0) > 0.98
    assert any("no stock class holds different widths" in text for text in plan.warnings)
    assert any(
        f"predicted {best.predicted:.3f}, measured {best.measured:.3f} nats" in note
        for note in plan.notes
    )
    for shape in plan.frontier:
        assert shape.widths is not None and len(shape.widths) == 8
    session = session_of()
    drops = MixedShape((48, 0, 36, 48, 0, 48, 12, 48), 2)
    increases: Increases = [{0: 0.5 - layer * 0.1} for layer in range(8)]
    scores = Width(WidthOptions(score="magnitude", restore="none"), RATIO).score(
        session, Cut(36, 0)
    )
    made = operations_for(drops, session.view.dimensions(), increases, scores)
    depth, width = by_kind(made)
    assert depth == [DropLayers(indices=(4,)), DropLayers(indices=(1,))] == list(made[:2])
    named = {one.layer: len(one.kept) for one in width}
    assert named == {0: 48, 2: 36, 3: 48, 5: 48, 6: 12, 7: 48}


def test_protected_layers_stay() -> None:
    """They may be narrowed."""
    plan = planned(session_of(), Target(ratio=0.5), protect_first=2, protect_last=3, verify=9)
    widths = [shape.widths for shape in plan.frontier]
    assert all(of is not None and all(of[:2]) and all(of[5:]) for of in widths)
    assert max(of.count(0) for of in widths if of is not None) == 3


def test_half_of_the_layers_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small the target."""
    budget = budget_of("memory", 0.5, 8, monkeypatch)
    assert max(one.removed for one in allotments(budget, sizes_of(8, 4, 8))) == 4


@pytest.mark.parametrize(
    ("target", "message", "hint"),
    [
        ({"ratio": 0.9}, "no shape meets the target", r"`ratio: (0\.\d+)` or less"),
        ({"parameters": 900}, "no shape meets the target", r"`parameters: (\d+)` or more"),
        ({"memory": 1000}, "no shape meets the target", r"`memory: (\d+)` or more"),
        ({"memory": "1GB"}, "removes nothing", "less than that"),
        ({"ratio": 0.002}, "less than half of the smallest step", r"`parameters: (\d+)` or less"),
        (
            {"latency": {"decode": 0.3}},
            "no shape meets the target",
            r"`latency: {decode: (0\.\d+)}` or more",
        ),
    ],
)
def test_impossible_targets_name_the_nearest(
    target: dict[str, Any], message: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything is measured; and what is named instead is possible, and not the model."""
    monkeypatch.setattr("slm_plugin.pruners.hybrid.budget.measure", timed)
    monkeypatch.setattr("slm_plugin.pruners.hybrid.hybrid.layer_increases", None)
    with pytest.raises(TargetError, match=message) as caught:
        planned(session_of(), Target(**target))
    told = re.search(hint, str(caught.value.hint))
    assert told
    if not told.groups():
        return
    monkeypatch.undo()
    monkeypatch.setattr("slm_plugin.pruners.hybrid.budget.measure", timed)
    ((kind, asked),) = target.items()
    kind = "parameters" if "parameters" in told[0] else kind
    possible: Any = {"decode": float(told[1])} if isinstance(asked, dict) else float(told[1])
    plan = planned(session_of(), Target(**{kind: possible}), verify=1)
    assert plan.after.parameters < plan.before.parameters


@pytest.mark.parametrize("ratio", [0.005, 0.01, 0.03, 0.08, 0.2])
@pytest.mark.parametrize(("width", "multiple_of"), [(50, 16), (48, 100), (50, 7)])
def test_a_size_between_shapes_becomes_the_nearest(
    ratio: float, width: int, multiple_of: int
) -> None:
    """Whatever the steps are, to half a step of one layer; the model itself is refused."""
    dense = Session(make_model(num_hidden_layers=4, intermediate_size=width)).view.dimensions()
    sizes = Range.of(dense, 4, kv_groups=False, multiple_of=multiple_of)
    budget = parameter_budget(Target(ratio=ratio), dense, dense)
    every = itertools.product((0, *sizes.widths), repeat=4)
    costs = [budget.cost(MixedShape(one, 2)) for one in every if one.count(0) <= 2]
    gaps = [abs(cost - budget.allowed) for cost in costs]
    nearest = min(gap for gap, cost in zip(gaps, costs, strict=True) if cost < budget.dense)
    pruner = Hybrid(HybridOptions(search="integer", multiple_of=multiple_of), Target(ratio=ratio))
    if nearest > budget.dense - budget.allowed:
        with pytest.raises(TargetError, match="less than half of the smallest step") as caught:
            pruner.check_target(dense, dense)
        told = re.search(r"`parameters: (\d+)`", str(caught.value.hint))
        assert told and int(told[1]) == max(cost for cost in costs if cost < budget.dense)
        return
    pruner.check_target(dense, dense)
    increases = random_increases(3, sizes, {*range(4)})
    solved = [cheapest(increases, one) for one in allotments(budget, sizes)]
    steps = [multiple_of * dense.channel_parameters / 2] if len(sizes.widths) > 1 else []
    for widths in solved:
        assert widths is not None and widths != (width,) * 4
        gap = abs(budget.cost(MixedShape(widths, 2)) - budget.allowed)
        assert gap <= max([nearest, *steps])


def test_a_killed_planner_goes_on(tmp_path: Path) -> None:
    """Every beginning of its journals ends in the same plan, which is that without journals."""

    def plan(**settings: Any) -> str:
        return planned(session_of(**settings), verify=3).to_json()

    expected = plan(journals=tmp_path)
    assert plan() == expected
    files = {file: file.read_text() for file in tmp_path.glob("*.jsonl")}
    assert sorted(len(text.splitlines()) for text in files.values()) == [2, 24]
    for share in (0.0, 0.5):
        for file, whole in files.items():
            lines = whole.splitlines(keepends=True)
            file.write_text("".join(lines[: int(share * len(lines))]))
        assert plan(journals=tmp_path) == expected
        assert {file: file.read_text() for file in files} == files


def test_a_second_run_measures_no_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other targets of the same model use what is known of its layers."""
    planned(session_of(journals=tmp_path), verify=1)
    monkeypatch.setattr("slm_plugin.pruners.hybrid.increases._Replacements", None)
    assert planned(session_of(journals=tmp_path), Target(ratio=0.3), verify=1).frontier


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_groups": True}, "leave kv_groups out"),
        ({"screen": 3}, "screen has no effect"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, Any], message: str) -> None:
    """In one line."""
    with pytest.raises(ValidationError, match=message):
        HybridOptions(search="integer", **options)


def recipe(stages: str, model: str = "smollm2-135m") -> str:
    """A recipe with some stages."""
    return (
        f"version: 1\nmodel: {{id: {model}}}\ncalibration: {{source: builtin}}\n"
        f"stages: [{stages}]\noutput: OUTPUT\n"
    )


def test_no_strategy_that_needs_one_width_may_follow() -> None:
    """A layer can be dropped behind the uniform search alone."""
    stage = "{prune: hybrid, target: {ratio: 0.1}%s}, {prune: deepest, target: {layers_removed: 1}}"
    assert Recipe.parse(recipe(stage % ""))
    with pytest.raises(RecipeError, match="layers of one width"):
        Recipe.parse(recipe(stage % ", search: integer"))


def test_without_scipy_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything is measured."""
    from slm_plugin import extras

    found = extras.found_version
    monkeypatch.setattr(
        extras, "found_version", lambda name: None if name == "scipy" else found(name)
    )
    with pytest.raises(MissingExtraError, match="needs scipy") as caught:
        planned(session_of())
    assert "slm-plugin[width]" in str(caught.value.hint)
