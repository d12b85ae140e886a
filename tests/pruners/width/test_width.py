"""The strategy `width`: every score plans what it promises, for channels and for KV groups."""

from __future__ import annotations

from typing import get_args

import pytest
import torch

from slm_plugin.errors import CalibrationError
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import KeepChannels, KeepHeads
from slm_plugin.pruners.gradients import gradient_moments, loss_gradients
from slm_plugin.pruners.width.width import Width
from slm_plugin.pruners.width.width_options import ScoreName, WidthOptions
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.tiny import make_model, random_tokens

TOKENS = random_tokens(10, 12)


def plan_of(score: ScoreName, **options: object) -> tuple[Session, Width]:
    """A session, and the strategy with small sizes."""
    few = {"steps": 2} if score == "policy_gradient" else {}
    made = WidthOptions.model_validate({"score": score, "multiple_of": 4, **few, **options})
    return Session(make_model(), calibration=TOKENS, batch_tokens=48), Width(
        made, Target(ratio=0.25)
    )


@pytest.mark.parametrize("score", get_args(ScoreName))
def test_every_score_ranks_channels_and_groups(score: ScoreName) -> None:
    """The plan applies, has the promised size, and keeps the best of every layer."""
    session, pruner = plan_of(score, kv_groups=1)
    plan = session.plan(pruner)
    channels = [op for op in plan.operations if isinstance(op, KeepChannels)]
    groups = [op for op in plan.operations if isinstance(op, KeepHeads)]
    assert len(channels) == len(groups) == 6
    for one in plan.scores:
        ranked = sorted(range(len(one.scores)), key=one.scores.__getitem__)
        kept = channels[one.layer].kept if one.unit == "mlp_channel" else groups[one.layer].kept
        assert {*ranked[-len(kept) :]} == {*kept}
    session.apply(plan)
    assert session.view.dimensions() == plan.after


def test_channels_alone_are_the_default() -> None:
    """Whole KV groups of a small model cost more than any score can tell."""
    session, pruner = plan_of("obs")
    plan = session.plan(pruner)
    assert {op.op for op in plan.operations} == {"keep_channels"}
    assert {one.unit for one in plan.scores} == {"mlp_channel"}
    errors = plan.scores[0].scores
    assert min(errors) > 0 and max(errors) == 1


def test_magnitudes_need_no_data_and_all_else_does() -> None:
    """Told before any work."""
    for score in get_args(ScoreName):
        _, pruner = plan_of(score)
        session = Session(make_model())
        if score == "magnitude":
            _, pruner = plan_of(score, restore="none")
            assert session.plan(pruner).operations and not pruner.needs_calibration
        else:
            assert pruner.needs_calibration
            with pytest.raises(CalibrationError, match="calibration"):
                session.plan(pruner)


def test_a_ridge_needs_two_samples() -> None:
    """One is held out."""
    _, pruner = plan_of("obs")
    with pytest.raises(CalibrationError, match="fewer than 2"):
        Session(make_model(), calibration=TOKENS[:1]).plan(pruner)


def test_moments_are_those_of_the_samples() -> None:
    """Against autograd on one sample after another."""
    view = DecoderView.of(make_model())
    means, squares = gradient_moments(view, TOKENS.split(4))
    each = [loss_gradients(view, [sample]) for sample in TOKENS.split(1)]
    for layer in range(6):
        for name, mean in means[layer].items():
            stacked = torch.stack([one[layer][name] for one in each])
            assert torch.allclose(mean, stacked.mean(0), atol=1e-7)
            assert torch.allclose(squares[layer][name], stacked.square().mean(0), atol=1e-9)


def test_taylor_forms_are_their_formulas() -> None:
    """Sums over gate row, up row and down column of w g, of w^2 F, and of their difference."""
    model = make_model()
    view = DecoderView.of(model)
    means, squares = gradient_moments(view, TOKENS.split(4))
    layer, channel = 3, 11

    def lines(values: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        return [
            values["gate_proj"][channel],
            values["up_proj"][channel],
            values["down_proj"][:, channel],
        ]

    weights = {n: m.weight.detach() for n, m in view.projections(view.layers[layer]).items()}
    first = {name: weights[name] * means[layer][name] for name in weights}
    second = {name: weights[name] ** 2 * squares[layer][name] for name in weights}
    mixed = {name: first[name] - second[name] / 2 for name in weights}
    expected = {
        "taylor": sum(float(line.abs().sum()) for line in lines(first)),
        "taylor_sum": sum(float(line.sum().abs()) for line in lines(first)),
        "taylor_second": sum(float(line.sum()) for line in lines(second)),
        "taylor_mixed": sum(float(line.abs().sum()) for line in lines(mixed)),
    }
    for score, value in expected.items():
        session, pruner = plan_of(score)  # type: ignore[arg-type]
        found = next(
            one
            for one in session.plan(pruner).scores
            if one.layer == layer and one.unit == "mlp_channel"
        )
        assert found.scores[channel] == pytest.approx(value, rel=1e-3)
    assert expected["taylor_sum"] <= expected["taylor"]


def test_a_layer_without_any_input_is_pruned_for_nothing() -> None:
    """Every channel is dead: all of them cost nothing, and no matrix has to be factorised."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[2].mlp.gate_proj.weight.zero_()
    _, pruner = plan_of("obs")
    session = Session(model, calibration=TOKENS)
    plan = session.plan(pruner)
    assert set(plan.scores[2].scores) == {0.0}
    session.apply(plan)
