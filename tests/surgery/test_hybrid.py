"""Plans of two parts: layers first, then what is inside the layers that are left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from slm_plugin.errors import PlanError
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.plans import (
    DropLayers,
    DropSublayers,
    KeepExperts,
    KeepHidden,
    KeepQueryHeads,
    MergeLayers,
    Operation,
    PruningPlan,
    RotateHidden,
)
from slm_plugin.recovery.closed_form.refit import Refit
from slm_plugin.session import Session
from tests.models.families.test_matrix import logits, reloaded
from tests.surgery.given import (
    LAYERS,
    TOKENS,
    Given,
    channels,
    heads,
    loss,
    needs_extra,
    planned,
    session_of,
    stock_loss,
)
from tests.tiny import make_model

# Operations on five layers, and the lowest layer in each of those that are left.
DEPTH: dict[str, tuple[list[Operation], list[int]]] = {
    "drop": ([DropLayers(indices=(1, 3))], [0, 2, 4]),
    "merge": ([MergeLayers(first=1, last=3)], [0, 1, 4]),
    "join": ([DropSublayers(attention=(3,), mlp=(2,))], [0, 1, 2, 4]),
    "merge and drop": (
        [MergeLayers(first=2, last=3, rule="mean"), DropLayers(indices=(0,))],
        [1, 2, 4],
    ),
}
FAMILIES = ["llama", "qwen3", "gemma2", "mixtral"]


def inside(family: str, layers: list[int]) -> list[Operation]:
    """Units of some layers, in each others; by the index that the original layer has."""
    if family == "mixtral":
        return [KeepExperts(layer=i, experts=(i % 2, 2 + i % 2)) for i in layers]
    return [*channels(layers), *heads(layers)]


def again(operations: list[Operation], layers: list[int]) -> list[Operation]:
    """The same operations for a model of which only these layers are left."""
    return [
        one.model_copy(update={"layer": layers.index(one.layer)})  # type: ignore[union-attr]
        for one in operations
    ]


def in_two(session: Session, depth: list[Operation], width: list[Operation]) -> None:
    """Carry two plans out, one after the other."""
    session.apply(planned(session, depth))
    session.apply(planned(session, width))


def require_same(one: Session, other: Session) -> None:
    """The same weights to the last bit, the same sizes, and the same outputs."""
    here, there = one.model.state_dict(), other.model.state_dict()
    assert here.keys() == there.keys()
    assert all(torch.equal(here[name], there[name]) for name in here)
    assert one.model.config.to_dict() == other.model.config.to_dict()
    assert one.view.dimensions() == other.view.dimensions()
    assert torch.equal(logits(one.model), logits(other.model))
    assert one.sources == other.sources


def skip_without_extra(family: str) -> None:
    """Experts alone need no package."""
    if family != "mixtral":
        pytest.importorskip("torch_pruning")


@pytest.mark.parametrize("name", DEPTH)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_two_plans_in_one(family: str, name: str, tmp_path: Path) -> None:
    """To the last bit; it says so of the loss, and the result loads with the stock class."""
    skip_without_extra(family)
    depth, left = DEPTH[name]
    width = inside(family, left)
    hybrid, two = session_of(family), session_of(family)
    plan = hybrid.plan(Given([*depth, *width]))
    assert plan.kind == "hybrid" and PruningPlan.parse(plan.to_json()) == plan
    hybrid.apply(plan)
    in_two(two, depth, again(width, left))
    require_same(hybrid, two)
    assert plan.loss_after == round(loss(hybrid), 6) != plan.loss_before
    assert plan.loss_after == pytest.approx(stock_loss(hybrid), abs=1e-4)
    hybrid.model.save_pretrained(tmp_path)
    assert torch.equal(logits(reloaded(tmp_path, hybrid.model)), logits(hybrid.model))


@needs_extra
def test_other_units_of_layers_left() -> None:
    """Query heads and widths that differ from layer to layer."""
    depth, left = DEPTH["merge"]
    uneven = [*channels([0], 48), *channels([1], 24), *channels([4], 32)]
    width = [*uneven, *(KeepQueryHeads(layer=i, query_heads=(1, 2)) for i in left)]
    hybrid, two = session_of("qwen3"), session_of("qwen3")
    plan = hybrid.plan(Given([*depth, *width]))
    hybrid.apply(plan)
    in_two(two, depth, again(width, left))
    require_same(hybrid, two)
    assert plan.after.widths == (48, 24, 32) and plan.loss_after == round(loss(hybrid), 6)


@needs_extra
def test_the_residual_stream_may_be_narrowed(tmp_path: Path) -> None:
    """With the reference of recoveries in the channels that are left; a loss is not foretold."""
    depth, left = DEPTH["drop"]
    hidden = KeepHidden(indices=tuple(range(4, 28)))
    width = [*channels(left), hidden]
    hybrid, two = session_of(), session_of()
    for session in (hybrid, two):
        session.keep_reference()
    plan = hybrid.plan(Given([*depth, *width]))
    hybrid.apply(plan)
    in_two(two, depth, [*again([*channels(left)], left), hidden])
    require_same(hybrid, two)
    assert plan.loss_after is None and plan.after.hidden_size == 24
    for one, other in zip(hybrid.reference or (), two.reference or (), strict=True):
        assert one.final.shape[-1] == 24 and torch.equal(one.inputs[3], other.inputs[3])


def test_a_rotation_follows_from_the_model_without_the_layers() -> None:
    """As in a second plan; and another calibration set is refused before anything changes."""
    depth, _ = DEPTH["drop"]
    hybrid, two = session_of(), session_of()
    assert hybrid.digest is not None
    stream = [RotateHidden(calibration=hybrid.digest), KeepHidden(indices=tuple(range(24)))]
    plan = planned(hybrid, [*depth, *stream])
    other = session_of(calibration=TOKENS[:3])
    with pytest.raises(PlanError, match="there is another one"):
        other.apply(plan)
    assert not other.spoiled and len(other.view.layers) == LAYERS
    hybrid.apply(plan)
    in_two(two, depth, stream)
    require_same(hybrid, two)


@needs_extra
def test_layers_that_are_read_from_disk_give_the_same(tmp_path: Path) -> None:
    """With `memory: layerwise`: the same plan and the same weights."""
    depth, left = DEPTH["merge and drop"]
    make_model("qwen3", num_hidden_layers=LAYERS).save_pretrained(tmp_path)
    sessions, plans = [], []
    for memory in ("whole", "layerwise"):
        source = {"id": str(tmp_path), "device": "cpu", "memory": memory}
        model, _ = load(ModelSource.model_validate(source))
        sessions.append(Session(model, calibration=TOKENS, batch_tokens=24))
        plans.append(sessions[-1].plan(Given([*depth, *inside("qwen3", left)])))
        sessions[-1].apply(plans[-1])
    assert plans[0].to_json() == plans[1].to_json() and plans[0].loss_after is not None
    assert sessions[0].fingerprint() == sessions[1].fingerprint()


@needs_extra
def test_a_refit_toward_own_outputs_sees_the_layers_between_the_parts() -> None:
    """Those that are left, before they are narrowed: each has one that it came from."""
    depth, left = DEPTH["merge"]
    width = inside("llama", left)
    found = []
    for parts in ([[*depth, *width]], [depth, again(width, left)]):
        session = session_of(calibration=TOKENS.repeat(2, 1))
        recovery = Refit(Refit.Options(toward="own"))
        session.expect([recovery])
        for operations in parts:
            session.apply(planned(session, operations))
        assert len(session.former_layers or ()) == 3
        unfitted = session.fingerprint()
        session.recover(recovery)
        assert session.fingerprint() != unfitted
        found.append(session)
    require_same(*found)


@pytest.fixture(scope="module")
def text() -> str:
    """A hybrid plan of a mixture as JSON: layers 1 to 3 become one, and experts go."""
    session = session_of("mixtral")
    depth, left = DEPTH["merge"]
    return planned(session, [*depth, *inside("mixtral", left)]).to_json()


EXPERTS = {"op": "keep_experts", "experts": [0, 1]}
MERGE = {"op": "merge_layers", "first": 1, "last": 3}
WRONG: list[tuple[str, Any, str]] = [
    ("operations.1.layer", 9, "operations.1.layer: names layer 9; the model has layers 0 to 4"),
    ("operations.2.layer", 2, "keep_experts names layer 2, which becomes part of layer 1"),
    ("operations.2.layer", 0, "operations.2: the MLP of layer 0 is taken already by operations.1"),
    ("operations.0", {"op": "drop_layers", "indices": [1, 3]}, "layer 1, which the plan removes"),
    ("operations", [MERGE, {**EXPERTS, "layer": 0}], "names layer 1 0 times; the plan leaves 3"),
    ("operations", [{**EXPERTS, "layer": 0}, MERGE], r"operations.1: merge_layers comes after"),
    ("operations", [MERGE], "there is no width operation .*its kind is depth"),
    ("operations", [{**EXPERTS, "layer": 0}], "there is no depth operation .*its kind is width"),
    ("kind", "depth", "operations.1: keep_experts is no operation of a depth plan"),
    ("kind", "width", "operations.0: merge_layers is no operation of a width plan"),
    ("kind", "both", "kind: "),
    ("after.layers", 5, "after.layers: promises 5, the operations leave 3"),
    ("after.experts", 4, "after.experts: promises 4, the operations leave 2"),
    (
        "operations.0",
        {"op": "drop_sublayers", "attention": [1], "mlp": [2]},
        "no stock model class has layers without one of both",
    ),
]


@pytest.mark.parametrize(("path", "value", "words"), WRONG)
def test_a_wrong_plan_is_told_in_one_line(text: str, path: str, value: Any, words: str) -> None:
    """When it is read."""
    tree: Any = json.loads(text)
    *above, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    at = tree
    for part in above:
        at = at[part]
    at[last] = value
    with pytest.raises(PlanError, match=words) as caught:
        PruningPlan.parse(json.dumps(tree))
    assert "\n" not in str(caught.value)


def test_a_wrong_second_part_leaves_the_model_as_it_was() -> None:
    """In a plan that was never read: all is checked before the layers go."""
    session = session_of("mixtral")
    depth, left = DEPTH["merge"]
    whole = planned(session, [*depth, *inside("mixtral", left)])
    short = KeepExperts(layer=4, experts=(1, 2, 3))
    wrong = whole.model_copy(update={"operations": (*whole.operations[:-1], short)})
    with pytest.raises(PlanError, match="keeps 2 units in one layer and 3 in another"):
        session.apply(wrong)
    assert not session.spoiled and len(session.view.layers) == LAYERS
    session.apply(whole)


def test_mixed_operations_need_the_kind() -> None:
    """A depth plan with width operations is refused as before."""
    session = session_of("mixtral")
    depth, left = DEPTH["merge"]
    plan = planned(session, [*depth, *inside("mixtral", left)])
    with pytest.raises(PlanError, match="the plan mixes depth and width operations"):
        session.apply(plan.model_copy(update={"kind": "depth"}))


def test_it_is_cut_within_its_layers() -> None:
    """To a depth plan; the whole is itself, and units of some layers alone are none."""
    session = session_of("mixtral")
    depth, left = DEPTH["merge and drop"]
    plan = session.plan(Given([*depth, *inside("mixtral", left)]))
    assert plan.upto(5) is plan
    for count, layers in ((1, 4), (2, 3)):
        cut = plan.upto(count)
        assert (cut.kind, cut.after.layers, cut.loss_after) == ("depth", layers, None)
        assert cut.operations == plan.operations[:count] and cut.loss_before == plan.loss_before
        assert PruningPlan.parse(cut.to_json()) == cut
        session_of("mixtral").apply(cut)
    for count in (3, 4):
        with pytest.raises(PlanError, match=rf"cut after operation {count}: from operation 3 on"):
            plan.upto(count)
    with pytest.raises(PlanError, match="has 5 operations, not 6"):
        plan.upto(6)
