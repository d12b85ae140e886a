"""Every plan states the calibration loss before and after it, and surgery confirms it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slm_plugin.errors import ContractError, PlanError
from slm_plugin.extras import missing
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.models.operators import put_operator
from slm_plugin.plans import (
    ConcatLayers,
    DropLayers,
    DropSublayers,
    KeepExperts,
    KeepHidden,
    KeepQueryHeads,
    LayerPart,
    MergeLayers,
    Operation,
    PruningPlan,
)
from slm_plugin.plans.losses import loss_change, with_losses
from slm_plugin.registry import pruners
from slm_plugin.session import Session
from slm_plugin.target import Target
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

UNEVEN = [*channels(range(2), 48), *channels([2, 3], 32), *channels([4], 24)]
CASES: dict[str, tuple[str, list[Operation]]] = {
    "drop": ("llama", [DropLayers(indices=(1, 3))]),
    "drop the highest": ("llama", [DropLayers(indices=(3, 4))]),
    "merge": ("qwen3", [MergeLayers(first=1, last=3)]),
    "join": ("gemma2", [DropSublayers(attention=(3,), mlp=(2,))]),
    "merge and drop": (
        "gemma3",
        [MergeLayers(first=3, last=4, rule="mean"), DropLayers(indices=(1,))],
    ),
    "channels": ("llama", [*channels()]),
    "channels of some layers": ("qwen3", UNEVEN),
    "channels and heads": ("gemma2", [*channels(), *heads()]),
    "heads in one matrix": ("phi3", [*channels(), *heads()]),
    "query heads": (
        "qwen3",
        [KeepQueryHeads(layer=i, query_heads=(i % 2, 2 + i % 2)) for i in range(LAYERS)],
    ),
    "experts": ("mixtral", [KeepExperts(layer=i, experts=(0, 1 + i % 3)) for i in range(LAYERS)]),
    "concatenate": (
        "llama",
        [
            ConcatLayers(
                parts=(
                    LayerPart(layer=1, channels=tuple(range(24)), kv_groups=(0,)),
                    LayerPart(layer=2, channels=tuple(range(24, 48)), kv_groups=(1,)),
                )
            )
        ],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_that_of_the_model_that_surgery_makes(name: str) -> None:
    """To the last digit written, and near the loss that the class itself computes."""
    family, operations = CASES[name]
    if any(one.kind == "width" and one.op != "keep_experts" for one in operations):
        pytest.importorskip("torch_pruning")
    session = session_of(family)
    plan = session.plan(Given(operations))
    assert plan.loss_before == round(loss(session), 6)
    assert plan.loss_before == pytest.approx(stock_loss(session), abs=1e-4)
    session.apply(plan)
    assert plan.loss_after == round(loss(session), 6) != plan.loss_before
    assert plan.loss_after == pytest.approx(stock_loss(session), abs=1e-4)


@pytest.mark.parametrize("name", ["merge and drop", "experts"])
def test_it_is_the_same_without_a_capture(name: str) -> None:
    """What other stages have captured changes no plan; and nothing is captured for it."""
    family, operations = CASES[name]
    captured = session_of(family)
    captured.captured()
    fresh = session_of(family)
    plan = fresh.plan(Given(operations))
    assert fresh._captured is None
    assert plan.to_json() == captured.plan(Given(operations)).to_json()


def test_only_layers_above_the_lowest_change_run_again() -> None:
    """With a capture, in which the layers below it ran already."""
    session, runs = session_of(), []
    session.captured()
    for index, layer in enumerate(session.view.layers):
        layer.register_forward_hook(lambda *_, index=index: runs.append(index))
    session.plan(Given([DropLayers(indices=(2,))]))
    batches = len(session.captured())
    assert sorted(runs) == sorted([3, 4] * batches)
    runs.clear()
    session.plan(Given([DropLayers(indices=(3, 4))]))
    assert runs == []


def test_a_stale_capture_is_not_used() -> None:
    """Weights changed since: both losses are of the present model."""
    session = session_of()
    session.captured()
    with torch.no_grad():
        session.model.model.layers[0].mlp.down_proj.weight.mul_(3)
    plan = session.plan(Given([DropLayers(indices=(3,))]))
    assert plan.loss_before == pytest.approx(stock_loss(session), abs=1e-4)


@needs_extra
@pytest.mark.parametrize("name", ["merge and drop", "channels and heads"])
def test_layers_that_are_read_from_disk_give_the_same_loss(name: str, tmp_path: Path) -> None:
    """With `memory: layerwise`, to the last digit."""
    family, operations = CASES[name]
    make_model(family, num_hidden_layers=LAYERS).save_pretrained(tmp_path)
    found = []
    for memory in ("whole", "layerwise"):
        source = ModelSource.model_validate(
            {"id": str(tmp_path), "device": "cpu", "memory": memory}
        )
        session = Session(load(source)[0], calibration=TOKENS, batch_tokens=24)
        plan = session.plan(Given(operations))
        found.append((plan.loss_before, plan.loss_after))
    assert found[0] == found[1] and None not in found[0]


def test_there_is_none_where_nothing_is_measured() -> None:
    """No calibration set, a strategy without data, samples of one token, no head to ask."""
    operations = [DropLayers(indices=(3,))]
    cases = [
        (Session(make_model(num_hidden_layers=LAYERS)), Given(operations)),
        (session_of(), Given(operations, needs=False)),
        (session_of(calibration=TOKENS[:, :1]), Given(operations)),
        (session_of(), Given([KeepHidden(indices=tuple(range(24)))])),
    ]
    for session, pruner in cases:
        plan = session.plan(pruner)
        assert (plan.loss_before, plan.loss_after) == (None, None)
        assert "loss_" not in plan.to_json() and not loss_change(plan)
        assert session._captured is None


def test_a_model_with_operators_is_not_planned() -> None:
    """No plan is applied to it, so none is searched for."""
    model = make_model(num_hidden_layers=LAYERS)
    put_operator(model.model.layers[1], torch.eye(32))
    session = Session(model, calibration=TOKENS)
    with pytest.raises(PlanError, match="the model has operators"):
        session.plan(Given([DropLayers(indices=(3,))]))


def test_what_a_strategy_says_of_the_loss_is_not_believed() -> None:
    """The session measures."""
    session = session_of()
    plan = session.plan(Given([DropLayers(indices=(3,))], loss_before=0.5, loss_after=0.5))
    assert plan.loss_before == round(loss(session), 6) and plan.loss_after not in (0.5, None)


def test_a_plan_that_cannot_be_carried_out_is_refused_at_once() -> None:
    """Blocks that do not alternate: surgery would tell it only later."""
    left = session_of().view.dimensions().without_layers(1)
    operations = [DropSublayers(attention=(2,), mlp=(3,))]
    with pytest.raises(ContractError, match=r"'given' gave back a plan that cannot be applied: "):
        session_of().plan(Given(operations, after=left))


def confident(**settings: object) -> Session:
    """A model on texts of its own, each of whose tokens it is sure of: whatever it loses, it sees.

    With random weights every layer matters, so that without three of five it is sure of others.
    """
    model = make_model(num_hidden_layers=LAYERS)
    tokens = TOKENS[:, :1]
    with torch.no_grad():
        model.lm_head.weight.mul_(8)
        for _ in range(12):
            tokens = torch.cat([tokens, model(tokens).logits[:, -1:].argmax(-1)], dim=1)
    return Session(model, calibration=tokens, batch_tokens=24, **settings)  # type: ignore[arg-type]


def plan_of(name: str, session: Session, removed: int, **options: object) -> PruningPlan:
    """A built-in strategy's plan."""
    cls = pruners.get(name)
    return session.plan(cls(cls.Options(**options), Target(layers_removed=removed)))


def test_a_ruined_model_is_warned_of() -> None:
    """By the published walk too: in one line with both figures and what usually helps."""
    plan = plan_of("slm", confident(), 3)
    assert plan.loss_before is not None and plan.loss_after is not None
    assert plan.loss_after - plan.loss_before > 1
    (warning,) = plan.warnings
    assert f"from {plan.loss_before:.3f} to {plan.loss_after:.3f} nats a token" in warning
    assert warning.endswith(
        "`recover: refit` as the next stage, `criterion: loss`, `search: greedy`, "
        "or `prune: repaired`"
    )
    assert "\n" not in warning


def test_advice_is_not_what_the_plan_does_already() -> None:
    """A search by the loss is not told to search by the loss; a released one cannot."""
    (warning,) = plan_of("slm", confident(), 3, criterion="loss", search="greedy").warnings
    assert "criterion" not in warning and "search" not in warning
    options = {"compatibility": "released", "criterion": "flat_cosine", "search": "sliding"}
    plan = planned(session_of(), [DropLayers(indices=(3,))], options=options)
    (warning,) = with_losses(plan, 2, 4).warnings
    assert "criterion" not in warning and "recover: refit" in warning


@pytest.mark.parametrize(("increase", "warned"), [(0.999, False), (1.0, False), (1.001, True)])
def test_the_bound_is_one_nat(increase: float, warned: bool) -> None:
    """Above it, not at it."""
    session = session_of()
    plan = with_losses(planned(session, [DropLayers(indices=(3,))]), 2.0, 2.0 + increase)
    assert bool(plan.warnings) is warned


def test_a_plan_with_its_repair_behind_it_is_not_judged() -> None:
    """The figures are told, as those before the repair."""
    session = confident()
    operations = [DropLayers(indices=(1, 2, 3))]
    plan = session.plan(Given(operations, followed_by={"recover": "refit"}))
    assert plan.loss_after is not None and plan.loss_before is not None
    assert plan.loss_after - plan.loss_before > 1
    assert not any("loss" in warning for warning in plan.warnings)
    assert loss_change(plan).endswith("nats a token, before the repair that follows")


def test_a_model_that_gives_nan_is_warned_of() -> None:
    """The file of a plan has no NaN."""
    session = session_of()
    session.captured()
    with torch.no_grad():
        session.model.model.layers[2].mlp.down_proj.weight.mul_(3e38)
    plan = session.plan(Given([DropLayers(indices=(1,))]))
    assert plan.loss_after is None
    assert plan.warnings[-1] == "the pruned model gives NaN or infinity on the calibration set"
    assert PruningPlan.parse(plan.to_json()) == plan


def test_a_cut_plan_says_nothing_of_the_loss_after_it() -> None:
    """Neither the figure nor the warning is true of fewer operations."""
    plan = plan_of("sleb", confident(), 3)
    assert plan.loss_after is not None and plan.warnings
    cut = plan.upto(1)
    assert (cut.loss_before, cut.loss_after) == (plan.loss_before, None)
    assert cut.warnings == ()
    assert plan.upto(3).loss_after == plan.loss_after and plan.upto(3).warnings == plan.warnings


@pytest.mark.parametrize("name", sorted(pruners.names()))
def test_every_strategy_states_it(name: str) -> None:
    """All that measure on calibration data, on a model that they take."""
    cls = pruners.get(name)
    if cls.extra and missing(cls.extra):
        pytest.skip(f"needs slm-plugin[{cls.extra}]")
    target = {"layers_removed": 1} if "layers_removed" in cls.targets else {"ratio": 0.2}
    short = {"hybrid": {"screen": 2, "verify": 2}, "shapley": {"samples": 20}}
    pruner = cls(cls.Options(**short.get(name, {})), Target.model_validate(target))
    session = session_of("mixtral" if name == "experts" else "llama", layers=7)
    plan = session.plan(pruner)
    assert (plan.loss_after is not None) is pruner.needs_calibration
    if pruner.needs_calibration:
        session.apply(plan)
        assert plan.loss_after == round(loss(session), 6)
