"""The planner of depth and width: shapes, predictions, measurements, and its plans."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch

from slm_plugin.calibration.captures import capture
from slm_plugin.errors import CalibrationError, TargetError, UnsupportedModelError, UserError
from slm_plugin.plans import DropLayers, PruningPlan
from slm_plugin.pruners.depth.repaired import Repaired
from slm_plugin.pruners.depth.repaired_options import RepairedOptions
from slm_plugin.pruners.depth.search.repaired_sets import repaired_sets
from slm_plugin.pruners.hybrid.budget import Budget, parameter_budget, time_budget
from slm_plugin.pruners.hybrid.divergence import Divergence
from slm_plugin.pruners.hybrid.hybrid import Hybrid, HybridOptions
from slm_plugin.pruners.hybrid.prediction import Curves, DivergenceModel
from slm_plugin.pruners.hybrid.range import Range, shapes_within
from slm_plugin.pruners.hybrid.repaired_states import repaired_states
from slm_plugin.pruners.hybrid.shapes import Shape
from slm_plugin.pruners.hybrid.timing import Times
from slm_plugin.pruners.hybrid.workload import Workload
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.recovery.pruned import TOKENS, recover, remove
from tests.tiny import make_model

RATIO = Target(ratio=0.2)


def session_of(family: str = "llama", **changes: Any) -> Session:
    """A session on a model of eight layers that keeps the dense states."""
    session = Session(make_model(family, num_hidden_layers=8), calibration=TOKENS, **changes)
    session.keep_reference()
    return session


def planned(session: Session, target: Target = RATIO, **options: Any) -> PruningPlan:
    """The planner's plan."""
    return session.plan(Hybrid(HybridOptions(multiple_of=4, **options), target))


def changed_by(session: Session, change: Callable[[], object]) -> list[float]:
    """The divergence of every held-out sample that a change of the session's model makes."""

    def final() -> list[torch.Tensor]:
        return [batch.final for batch in capture(session.view, [TOKENS[::5]])]

    def logs() -> torch.Tensor:
        with torch.no_grad():
            out: torch.Tensor = session.model(TOKENS[::5], use_cache=False).logits
        return out.double().log_softmax(-1)

    divergence, before = Divergence(final(), session.view.logits), logs()
    change()
    found = divergence.samples(final())
    # The definition, by the forward pass of the class.
    expected = (before.exp() * (before - logs())).sum(-1).mean(-1)
    assert found == pytest.approx(expected.tolist(), rel=1e-4, abs=1e-6)
    return found


def restored(session: Session, plan: PruningPlan) -> None:
    """What a recipe makes of a plan."""
    session.apply(plan)
    recover("refit", session)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3", "phi3"])
def test_what_is_measured_is_the_pruned_and_refitted_model(family: str) -> None:
    """To the last digit: layers, channels, both; as surgery and the recovery leave it."""
    for target in (Target(parameters=54_000), RATIO):
        session = session_of(family)
        plan = planned(session, target, verify=2)
        (best,) = [shape for shape in plan.frontier if shape.chosen]
        found = changed_by(session, lambda s=session, p=plan: restored(s, p))  # type: ignore[misc]
        assert best.measured == pytest.approx(fmean(found), abs=1e-7) and best.measured > 1e-3


def test_a_plan_of_layers_alone_is_repaired_from_its_gap_on() -> None:
    """The layers below the gap stay what they are."""
    session = session_of()
    operations = DropLayers(indices=(3,)), DropLayers(indices=(6,))
    found = torch.cat(repaired_states(session, operations))
    remove(session, *operations)
    recover("refit", session)
    left = torch.cat([batch.final for batch in session.captured()])
    assert torch.equal(found, left[::5])


def test_what_is_chosen_is_the_best_that_was_measured() -> None:
    """Every shape meets the target, and with enough measurements all of them are tried."""
    session = session_of()
    plan = planned(session, verify=9)
    assert all(shape.measured is not None for shape in plan.frontier)
    best = min(plan.frontier, key=lambda shape: shape.measured or 0)
    assert best.chosen and sum(shape.chosen for shape in plan.frontier) == 1
    assert (plan.after.layers, plan.after.intermediate_size) == (best.layers, best.mlp_width)
    assert plan.kind in ("depth", "width", "hybrid") and plan.adherence is not None
    assert PruningPlan.parse(plan.to_json()) == plan


def test_the_noise_of_the_choice_is_told(tmp_path: Path) -> None:
    """The mean difference to the next best by samples, and its standard error."""
    plan = planned(session_of(journals=tmp_path), verify=9)
    first, second = sorted(plan.frontier, key=lambda shape: shape.measured or 0)[:2]
    (told,) = [note for note in plan.notes if note.startswith("the next best")]
    assert second.measured is not None and first.measured is not None
    assert f"lies {second.measured - first.measured:.3f} nats a token behind" in told
    samples: dict[tuple[int, int], list[float]] = {}
    for line in "".join(file.read_text() for file in tmp_path.glob("*.jsonl")).splitlines():
        stored = json.loads(line)
        match stored["key"]:
            case [int(layers), int(width), int()]:
                samples[layers, width] = stored["value"]
    pair = (samples[shape.layers, shape.mlp_width] for shape in (second, first))
    gaps = [one - other for one, other in zip(*pair, strict=True)]
    assert f"standard error {stdev(gaps) / math.sqrt(3):.3f} over 3 held-out samples" in told
    assert f"KL to the model before: predicted {first.predicted:.3f}, measured" in "".join(
        plan.notes
    )


def test_few_measurements_go_to_what_is_predicted_best() -> None:
    """The width alone comes first, where it meets the target; then what is predicted best."""
    plan = planned(session_of(), Target(ratio=0.35), verify=2)
    measured = [shape for shape in plan.frontier if shape.measured is not None]
    assert len(measured) == 2 < len(plan.frontier)
    assert any(shape.layers == 8 for shape in measured) == (plan.frontier[0].layers == 8)


def test_depth_alone_is_predicted_by_the_held_out_samples_of_the_search() -> None:
    """Without one layer: what the exchanges of `repaired` measure, on samples that no fit uses."""
    session = session_of()
    dense = session.view.dimensions()
    target = Target(parameters=dense.without_layers(1).parameters)
    plan = planned(session, target, verify=1)
    (shape,) = [one for one in plan.frontier if (one.layers, one.mlp_width) == (7, 48)]
    (first,) = Repaired(RepairedOptions(judge="kl"), Target(layers_removed=1)).plan(session).trials
    with repaired_sets(session, "boundary", "logit_kl", whole=True) as judge:
        expected = -judge((first.first,), None).value
    assert shape.predicted == pytest.approx(expected, rel=1e-9)


def toy(depth: list[float], per_channel: float, a: float, b: float) -> tuple[Curves, Any]:
    """Curves of a model whose loss has exactly the form of the prediction."""
    dense = Shape(8, 64, 2)
    width = {32: (32 * per_channel) ** 1.5, 48: (16 * per_channel) ** 1.5}
    curves = Curves(dense, depth, width, {1: 0.4})

    def loss(shape: Shape) -> float:
        of_depth = depth[8 - shape.layers]
        of_width = ((64 - shape.mlp_width) * per_channel) ** 1.5 + 0.4 * (shape.kv_groups == 1)
        return a * of_depth + of_width * shape.layers / 8 + b * of_depth * of_width

    return curves, loss


@pytest.mark.parametrize(("a", "b"), [(1.0, 0.0), (0.6, 0.3)])
def test_a_loss_of_its_form_is_predicted(a: float, b: float) -> None:
    """On unmeasured shapes, from four measured ones; so the choice is the exhaustive one."""
    depth = [0.0, 0.05, 0.13, 0.3, 0.7]
    curves, loss = toy(depth, 0.02, a, b)
    shapes = [Shape(layers, width, 2) for layers in range(4, 9) for width in range(32, 65, 8)]
    measured = [Shape(6, 40, 2), Shape(5, 48, 2), Shape(4, 32, 2), Shape(4, 56, 2)]
    model = DivergenceModel(curves).fitted({shape: loss(shape) for shape in measured})
    predicted = {shape: model.divergence(shape) for shape in shapes}
    # What is known before holds the factors a little back.
    assert predicted == pytest.approx({s: loss(s) for s in shapes}, rel=0.06, abs=2e-3)
    kept = [s for s in shapes if 7 <= s.layers + s.mlp_width / 16 <= 8]
    assert min(kept, key=model.divergence) == min(kept, key=loss)
    assert DivergenceModel(curves).divergence(Shape(8, 64, 1)) == pytest.approx(0.4)
    assert DivergenceModel(curves).divergence(Shape(8, 64, 2)) == 0


def budget(limit: bool, allowed: float) -> Budget:
    """A budget in layers times channels."""
    return Budget(
        RATIO, 8 * 64, 8 * 64, allowed, lambda shape: shape.layers * shape.mlp_width, "units", limit
    )


@pytest.mark.parametrize("limit", [False, True])
@pytest.mark.parametrize("allowed", [440.0, 384.0, 300.5])
def test_shapes_are_those_of_brute_force(limit: bool, allowed: float) -> None:
    """For every number of layers the widest within a limit, or the nearest to a size."""
    dense = make_model(num_hidden_layers=8, intermediate_size=64)
    sizes = Range.of(Session(dense).view.dimensions(), 8, kv_groups=False, multiple_of=8)
    assert sizes.layers_removed == 4 and sizes.widths == [64, 56, 48, 40, 32, 24, 16]
    expected = []
    for layers in range(8, 3, -1):
        costs = {width: layers * width for width in sizes.widths}
        if limit:
            fitting = [width for width in costs if costs[width] <= allowed]
            expected += [(layers, max(fitting))] if fitting else []
        else:
            nearest = min(costs, key=lambda width: abs(costs[width] - allowed))
            near = abs(costs[nearest] - allowed) <= 4 * layers + 1
            expected += [(layers, nearest)] if near else []
        if layers * 64 <= allowed:
            break
    found = shapes_within(budget(limit, allowed), sizes)
    assert [(shape.layers, shape.mlp_width) for shape in found] == expected
    for shape in found:
        asked, gone = 512 - allowed, 512 - shape.layers * shape.mlp_width
        share = min(asked, gone) / max(asked, gone)
        assert budget(limit, allowed).adherence(shape.layers * shape.mlp_width) == share
        assert not limit or gone >= asked


def timed(session: Session, workload: Workload, shapes: list[Shape]) -> dict[Shape, Times]:
    """Times of exactly the modelled form, a part of which no pruning saves."""
    seconds = {s: 0.5 + s.layers * (0.05 + 0.01 * s.kv_groups + 1e-3 * s.mlp_width) for s in shapes}
    return {shape: Times(3 * one, one) for shape, one in seconds.items()}


@pytest.mark.parametrize(
    ("target", "message", "hint"),
    [
        ({"ratio": 0.9}, "no shape meets the target", r"`ratio: (0\.\d+)` or less"),
        ({"parameters": 900}, "no shape meets the target", r"`parameters: (\d+)` or more"),
        ({"parameters": 10**7}, "removes nothing", "less than that"),
        ({"memory": 1000}, "no shape meets the target", r"`memory: (\d+)` or more"),
        ({"memory": "1GB"}, "removes nothing", "less than that"),
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
    """One line each, before a search; and what is named instead is possible."""
    monkeypatch.setattr("slm_plugin.pruners.hybrid.budget.measure", timed)
    session = session_of()
    with pytest.raises(TargetError, match=message) as caught:
        planned(session, Target(**target))
    told = re.search(hint, str(caught.value.hint))
    assert told
    if told.groups():
        ((kind, asked),) = target.items()
        possible: Any = {"decode": float(told[1])} if isinstance(asked, dict) else float(told[1])
        cheap = {"verify": 1, "screen": 1, "score": "magnitude"}
        assert planned(session, Target(**{kind: possible}), **cheap).frontier


@pytest.mark.parametrize("ratio", [0.01, 0.03, 0.05, 0.08, 0.12, 0.2])
@pytest.mark.parametrize(("width", "multiple_of"), [(50, 16), (48, 100), (50, 7)])
def test_a_size_between_shapes_becomes_the_nearest(
    ratio: float, width: int, multiple_of: int
) -> None:
    """Whatever the steps are; and where that is the model itself, the next shape is named."""
    session = Session(make_model(num_hidden_layers=4, intermediate_size=width))
    dense = session.view.dimensions()
    sizes = Range.of(dense, 4, kv_groups=False, multiple_of=multiple_of)
    every = [(layers, width) for layers in range(4, 1, -1) for width in sizes.widths]
    cost = {one: Shape(*one, 2).of_model(dense).parameters for one in every}
    allowed = parameter_budget(Target(ratio=ratio), dense, dense).allowed
    nearest = min(abs(one - allowed) for one in cost.values())
    pruner = Hybrid(HybridOptions(multiple_of=multiple_of), Target(ratio=ratio))
    if nearest == dense.parameters - allowed:
        with pytest.raises(TargetError, match="less than half of the smallest step") as caught:
            pruner.check_target(dense, dense)
        told = re.search(r"`parameters: (\d+)`", str(caught.value.hint))
        assert told and int(told[1]) == max({*cost.values()} - {dense.parameters})
        return
    found = shapes_within(parameter_budget(Target(ratio=ratio), dense, dense), sizes)
    assert Shape.of(dense) not in found
    assert min(abs(cost[one.layers, one.mlp_width] - allowed) for one in found) == nearest


def test_nothing_that_may_go_is_said() -> None:
    """Layers are protected and no width is a multiple."""
    pruner = Hybrid(HybridOptions(multiple_of=100, protect_first=8), RATIO)
    dense = session_of().view.dimensions()
    with pytest.raises(TargetError, match="as many parameters as the model") as caught:
        pruner.check_target(dense, dense)
    assert "protect fewer layers" in str(caught.value.hint)


def test_shares_are_of_the_original_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind another stage: of its time, and in the ratio that is named instead."""
    monkeypatch.setattr("slm_plugin.pruners.hybrid.budget.measure", timed)
    session = session_of()
    whole = session.view.dimensions()
    remove(session, DropLayers(indices=(1,)))
    left = session.view.dimensions()
    budget = time_budget(session, Target(latency={"decode": 0.8}), Workload(), kv_groups=False)
    times = timed(session, Workload(), [Shape.of(whole), Shape.of(left)])
    original, current = (time.decode for time in times.values())
    assert (budget.dense, budget.allowed) == pytest.approx((current, 0.8 * original))
    with pytest.raises(TargetError, match="no shape") as caught:
        planned(session, Target(ratio=0.95))
    told = re.search(r"`ratio: (0\.\d+)`", str(caught.value.hint))
    assert told and planned(session, Target(ratio=float(told[1])), verify=1).frontier
    session.original = whole.model_copy(update={"hidden_size": 64})
    with pytest.raises(UnsupportedModelError, match="removed hidden channels"):
        time_budget(session, Target(latency={"decode": 0.8}), Workload(), kv_groups=False)


def test_counts_are_said_in_full() -> None:
    """However large, and times with their first digits."""
    counted = budget(limit=False, allowed=100.0)
    assert counted.said(134_515_008) == "134,515,008 units"
    target = Target(latency={"decode": 0.8})
    assert dataclasses.replace(counted, target=target).said(0.012345678) == "0.0123457 units"


def test_low_adherence_is_warned_of_with_what_would_be_nearer() -> None:
    """The shape of least divergence need not be the nearest."""
    plan = session_of().plan(Hybrid(HybridOptions(multiple_of=24), Target(ratio=0.3)))
    asked = 0.3
    shares = [1 - shape.cost for shape in plan.frontier]
    near = [min(asked, share) / max(asked, share) for share in shares]
    (told,) = [text for text in plan.warnings if text.startswith("adherence")] or [""]
    nearer = sum(round(one, 4) > (plan.adherence or 0) for one in near)
    assert (plan.adherence or 0) < 0.98 and f": {nearer or 'no'} other shape" in told


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_time_is_met_by_the_time_model(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """No shape of the frontier takes longer than asked, and the plan says how it was found."""
    monkeypatch.setattr("slm_plugin.pruners.hybrid.budget.measure", timed)
    session = session_of()
    plan = planned(session, Target(latency={phase: 0.8}), verify=1, score="magnitude")
    assert plan.frontier and all(shape.cost <= 0.8 + 1e-9 for shape in plan.frontier)
    times = timed(session, Workload(), [Shape(8, 48, 2), Shape.of(plan.after)])
    dense, after = times.values()
    (best,) = [shape for shape in plan.frontier if shape.chosen]
    assert after.decode / dense.decode == pytest.approx(best.cost, rel=1e-6)
    assert any("largest residual of the time model 0.0%" in note for note in plan.notes)


@pytest.mark.parametrize("target", [{"memory": "50kB"}, {"latency": {"decode": 0.8}}])
def test_a_workload_must_fit_the_positions(target: dict[str, Any]) -> None:
    """No cache is longer than what the model reads."""
    told = f"a target of {next(iter(target))} needs 300 positions and the model has 256"
    with pytest.raises(UserError, match=told):
        planned(session_of(), Target(**target), prompt_tokens=260, new_tokens=40)


def test_memory_counts_weights_and_cache() -> None:
    """The chosen model has the bytes that its plan says."""
    session = session_of()
    dense = session.view.dimensions()
    whole = Workload(prompt_tokens=64, new_tokens=16).memory(dense, torch.float32)
    plan = planned(session, Target(memory=int(0.8 * whole)), prompt_tokens=64, new_tokens=16)
    (best,) = [shape for shape in plan.frontier if shape.chosen]
    session.apply(plan)
    after = session.view.dimensions()
    cache = 2 * after.layers * after.kv_heads * after.head_dim * 80 * 4
    assert best.cost * whole == pytest.approx(4 * after.parameters + cache)
    assert best.cost <= 0.8


def test_kv_groups_go_on_request() -> None:
    """Their loss is measured alone first, and a shape without some is among the candidates."""
    plan = planned(session_of(), Target(ratio=0.3), kv_groups=True, verify=1)
    groups = {shape.kv_groups for shape in plan.frontier}
    assert groups == {1, 2}
    without = planned(session_of(), Target(ratio=0.3), verify=1)
    assert {shape.kv_groups for shape in without.frontier} == {2}


def test_a_killed_planner_goes_on(tmp_path: Path) -> None:
    """Every beginning of its journals ends in the same plan."""

    def plan() -> str:
        cheap = {"score": "magnitude", "screen": 2}
        return planned(session_of(journals=tmp_path), verify=3, **cheap).to_json()

    expected = plan()
    files = {file: file.read_text() for file in tmp_path.glob("*.jsonl")}
    assert len(files) == 3
    for share in (0.0, 0.5):
        for file, whole in files.items():
            lines = whole.splitlines(keepends=True)
            file.write_text("".join(lines[: int(share * len(lines))]))
        assert plan() == expected
        assert {file: file.read_text() for file in files} == files


def test_losses_toward_other_states_are_other_losses(tmp_path: Path) -> None:
    """One journal folder serves a model whose dense states are known, and the model by itself."""

    def plan(*, keeps: bool, **changes: Any) -> str:
        session = Session(make_model(num_hidden_layers=5), calibration=TOKENS, **changes)
        if keeps:
            session.keep_reference()
        remove(session, DropLayers(indices=(3,)))
        return planned(session, verify=1, score="magnitude", screen=2).to_json()

    plans = {keeps: plan(keeps=keeps) for keeps in (True, False)}
    assert plans[True] != plans[False]
    assert {keeps: plan(keeps=keeps, journals=tmp_path) for keeps in plans} == plans


def test_it_needs_data_of_more_than_one_sample() -> None:
    """One sample is held out."""
    session = Session(make_model(num_hidden_layers=8), calibration=TOKENS[:1])
    with pytest.raises(CalibrationError, match="fewer than 2 calibration samples"):
        planned(session)


def test_the_model_is_captured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """For the search, the scores, the losses and the plan's own figures together."""
    calls = []
    monkeypatch.setattr(
        "slm_plugin.session.capture", lambda *given: calls.append(1) or capture(*given)
    )
    session = session_of()
    planned(session)
    assert len(calls) == 1
