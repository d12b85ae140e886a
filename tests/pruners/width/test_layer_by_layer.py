"""Scores of a layer on the model as pruned and restored below it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("torch_pruning")

from slm_plugin.plans import KeepChannels, PruningPlan
from slm_plugin.pruners.input_sums import LayerInputs, layer_inputs
from slm_plugin.pruners.width.brain_surgeon import error_curve
from slm_plugin.pruners.width.width import Width
from slm_plugin.pruners.width.width_options import WidthOptions
from slm_plugin.recovery.closed_form.refit import Refit
from slm_plugin.session import Session
from slm_plugin.surgery.channels import apply_channels
from slm_plugin.target import Target
from tests.recovery.pruned import drop, remove
from tests.tiny import make_model, random_tokens

TOKENS = random_tokens(10, 12)


def obs(**options: Any) -> Width:
    """Optimal Brain Surgeon with small sizes."""
    made = WidthOptions.model_validate({"score": "obs", "multiple_of": 4, **options})
    return Width(made, Target(ratio=0.2))


def restored(session: Session, pruner: Width, plan: PruningPlan) -> None:
    """What a recipe does after planning."""
    stage = dict(pruner.followed_by or {})
    recoveries = []
    if stage:
        assert stage.pop("recover") == "refit"
        recoveries.append(Refit(Refit.Options.model_validate(stage)))
    session.expect(recoveries)
    session.apply(plan)
    for recovery in recoveries:
        session.recover(recovery)


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """Grows by the input of every layer that is scored, ``(samples, length, hidden)``."""
    found: list[torch.Tensor] = []
    score = Width._of_layer

    def listening(self: Width, inputs: LayerInputs, *args: Any, **kwargs: Any) -> Any:
        found.append(torch.cat([hidden for hidden, _ in inputs.runs()]))
        return score(self, inputs, *args, **kwargs)

    monkeypatch.setattr(Width, "_of_layer", listening)
    return found


@pytest.mark.parametrize("restore", ["dense", "own", "none"])
@pytest.mark.parametrize("heads", [{}, {"kv_groups": 1}, {"query_heads": 1}])
def test_planning_sees_the_states_of_the_restored_model(
    restore: str, heads: dict[str, int], seen: list[torch.Tensor]
) -> None:
    """Bit for bit, and not those of the dense one; no weight changes while planning."""
    session = Session(make_model(num_hidden_layers=3), calibration=TOKENS, batch_tokens=48)
    dense = [torch.cat([b.inputs[index] for b in session.captured()]) for index in range(3)]
    before = {name: value.clone() for name, value in session.model.state_dict().items()}
    pruner = obs(restore=restore, **heads)
    plan = session.plan(pruner)
    assert all(torch.equal(before[n], value) for n, value in session.model.state_dict().items())
    restored(session, pruner, plan)
    for index, (found, former) in enumerate(zip(seen, dense, strict=True)):
        now = torch.cat([batch.inputs[index] for batch in session.captured()])
        assert torch.equal(found, now)
        assert torch.equal(found, former) == (index == 0)


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_layers_of_different_widths_are_cut_at_their_own(
    family: str, seen: list[torch.Tensor]
) -> None:
    """Behind an allocation, where one matrix holds gate and up as well."""
    session = Session(make_model(family), calibration=TOKENS, batch_tokens=48)
    first = WidthOptions(allocation="alpha", spread=0.6, multiple_of=2, restore="none")
    session.apply(session.plan(Width(first, Target(ratio=0.15))))
    assert session.view.dimensions().layer_widths
    seen.clear()
    pruner = obs(restore="none", multiple_of=2)
    pruner.target = Target(ratio=0.25)
    restored(session, pruner, session.plan(pruner))
    for index, found in enumerate(seen):
        assert torch.equal(found, torch.cat([b.inputs[index] for b in session.captured()]))


def test_one_layer_is_scored_as_it_is() -> None:
    """There is nothing below it; and the lowest of several is, too."""
    for layers in (1, 3):
        session = Session(make_model(num_hidden_layers=layers), calibration=TOKENS)
        plan = session.plan(obs())
        lowest = next(layer_inputs(session))
        count = len(plan.operations[0].kept)  # type: ignore[union-attr]
        expected = error_curve(lowest.read_by("down_proj"), 48 - count, 1)
        assert plan.scores[0].scores == pytest.approx(expected.tolist(), rel=1e-7)


def test_the_layers_above_answer_what_was_removed_below() -> None:
    """Their scores are those of a model that was cut by the operations below them."""
    model = make_model(num_hidden_layers=3)
    plan = Session(model, calibration=TOKENS).plan(obs(restore="none"))
    narrow = [op for op in plan.operations if isinstance(op, KeepChannels)]
    assert len(narrow) == 3
    cut = make_model(num_hidden_layers=3)
    # The columns of the removed channels at 0 compute the same, and the top layer stays whole.
    with torch.no_grad():
        for operation in narrow[:2]:
            gone = sorted(set(range(48)) - set(operation.indices))
            cut.model.layers[operation.layer].mlp.down_proj.weight[:, gone] = 0
    top = [*layer_inputs(Session(cut, calibration=TOKENS))][2]
    expected = error_curve(top.read_by("down_proj"), 48 - len(narrow[2].indices), 1)
    assert plan.scores[2].scores == pytest.approx(expected.tolist(), rel=1e-4)


def test_targets_follow_a_depth_stage() -> None:
    """After layers went, a layer aims at the dense state above it, as the refit does."""
    session = Session(make_model(num_hidden_layers=4), calibration=TOKENS)
    session.expect([Refit(Refit.Options())])
    remove(session, drop(1))
    size = session.model.num_parameters()
    pruner = Width(obs().options, Target(parameters=size - 3 * 16 * 96))
    first = session.plan(pruner)
    other = Session(session.model, calibration=TOKENS).plan(pruner)
    assert first.scores[0] == other.scores[0] and first.scores[2] != other.scores[2]


def test_a_whole_attention_is_not_written_through_the_copy() -> None:
    """Where only channels go, the copy's attention must not share its weights with the model."""
    session = Session(make_model(num_hidden_layers=2), calibration=TOKENS)
    out = session.model.model.layers[0].self_attn.o_proj.weight
    before = out.detach().clone()
    pruner = obs(kv_groups="auto")
    assert pruner.followed_by is not None and pruner.followed_by["o_proj"]
    plan = session.plan(pruner)
    assert torch.equal(out, before)
    assert {op.op for op in plan.operations} == {"keep_channels"}
    apply_channels(session.model, plan.operations)  # type: ignore[arg-type]
