"""Probabilities learned from masked models: losses, starts, journals, and what is refused."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

pytest.importorskip("torch_pruning")

from slm_plugin.errors import NumericalError
from slm_plugin.plans import KeepChannels, PruningPlan
from slm_plugin.pruners.width import masked_losses
from slm_plugin.pruners.width.masked_losses import initial, masked_loss
from slm_plugin.pruners.width.width import Width
from slm_plugin.pruners.width.width_options import WidthOptions
from slm_plugin.session import Session
from slm_plugin.surgery.groups import members
from slm_plugin.target import Target
from tests.tiny import make_model, random_tokens

TOKENS = random_tokens(6, 12)
STEPS = 4


def strategy(**options: Any) -> Width:
    """A short descent."""
    given = {"score": "policy_gradient", "steps": STEPS, "multiple_of": 4, **options}
    return Width(WidthOptions.model_validate(given), Target(ratio=0.2))


def small() -> PreTrainedModel:
    """A model of few layers."""
    return make_model(num_hidden_layers=3)


def planned(model: PreTrainedModel, journals: Path | None = None, **options: Any) -> PruningPlan:
    """The plan of a short descent."""
    session = Session(model, calibration=TOKENS, batch_tokens=24, journals=journals)
    return session.plan(strategy(**options))


def test_the_loss_of_no_mask_is_that_of_the_model() -> None:
    """Computed by the class itself; and no hook is left behind."""
    session = Session(small(), calibration=TOKENS, batch_tokens=100)
    (batch,) = session.captured()
    modules = [session.view.projections(layer)["down_proj"] for layer in session.view.layers]
    found = masked_loss(session.view, batch, modules, [torch.ones(48)] * 3)
    with torch.no_grad():
        assert found == pytest.approx(float(session.model(TOKENS, labels=TOKENS).loss), rel=1e-5)
    silent = masked_loss(session.view, batch, modules, [torch.zeros(48)] * 3)
    assert silent != pytest.approx(found, rel=1e-3)
    assert not any(module._forward_pre_hooks for module in modules)


def test_a_masked_group_is_silent() -> None:
    """The loss is that of a model in which nothing reads the group's columns."""
    session = Session(small(), calibration=TOKENS, batch_tokens=100)
    view, (batch,) = session.view, session.captured()
    reader = view.projections(view.layers[1])["o_proj"]
    found = masked_loss(view, batch, [reader], [torch.tensor([1.0, 0.0])])
    columns = list(members("kv_groups", [1], view.dimensions())["o_proj"])
    with torch.no_grad():
        reader.weight[:, columns] = 0
        expected = float(session.model(TOKENS, labels=TOKENS).loss)
    assert found == pytest.approx(expected, rel=1e-6)


def test_probabilities_start_from_standardised_scores() -> None:
    """Their mean is the share that stays, their order that of the scores."""
    found = initial([1.0, 2.0, 4.0, 9.0], keep=3)
    assert float(found.mean()) == pytest.approx(0.75)
    assert found.tolist() == sorted(found.tolist())
    deviation = math.sqrt(((4 - 1) ** 2 + (4 - 2) ** 2 + 0 + (9 - 4) ** 2) / 4)
    steps = [1 / (1 + math.exp(-(score - 4) / deviation)) for score in (1, 9)]
    assert float(found[3] - found[0]) == pytest.approx(steps[1] - steps[0])
    assert initial([2.0, 2.0], keep=1).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("kv_groups", [0, 1])
def test_every_layer_meets_its_budget(kv_groups: int) -> None:
    """The scores of a layer are probabilities that add up to the units that stay."""
    plan = planned(small(), kv_groups=kv_groups)
    kinds = {"mlp_channel", "kv_group"} if kv_groups else {"mlp_channel"}
    assert {one.unit for one in plan.scores} == kinds
    for one in plan.scores:
        left = plan.after.intermediate_size if one.unit == "mlp_channel" else plan.after.kv_heads
        assert sum(one.scores) == pytest.approx(left, abs=1e-6)
        assert min(one.scores) >= 0 and max(one.scores) <= 1


def test_planted_useless_channels_go_first() -> None:
    """Nothing reads them, so they start low and no loss speaks for them."""
    model = small()
    useless = [3, 17, 40]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[:, useless] = 0
    for operation in planned(model).operations:
        assert isinstance(operation, KeepChannels)
        assert not {*useless} & {*operation.indices}


def test_both_estimators_learn_and_differ() -> None:
    """The plan has more than the scores that it starts from."""
    found = [
        [one.scores for one in planned(small(), **options).scores]
        for options in (
            {"learning_rate": 0.1},
            {"learning_rate": 0.1, "estimator": "released"},
            {"learning_rate": 1e-9},
        )
    ]
    assert found[0] != found[1] and found[0] != found[2] != found[1]


def test_an_interrupted_descent_continues_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed between two masks of a step: no loss is measured twice, and the plan is the same."""
    whole = planned(small())
    measure, calls = masked_losses.masked_loss, itertools.count(1)

    def killed(*given: Any) -> float:
        if next(calls) == 6:
            raise KeyboardInterrupt
        return measure(*given)

    monkeypatch.setattr(masked_losses, "masked_loss", killed)
    with pytest.raises(KeyboardInterrupt):
        planned(small(), tmp_path)
    assert planned(small(), tmp_path).to_json() == whole.to_json()
    assert next(calls) == 2 * STEPS + 2
    assert f"5 trials read from {next(tmp_path.iterdir())}" in " ".join(
        capsys.readouterr().err.split()
    )
    # Everything is stored now; other options have their own file.
    assert planned(small(), tmp_path).to_json() == whole.to_json()
    assert next(calls) == 2 * STEPS + 3
    planned(small(), tmp_path, estimator="released")
    assert next(calls) == 4 * STEPS + 4
    assert len([*tmp_path.iterdir()]) == 2


def test_a_stored_loss_is_a_number_of_a_step_and_a_draw() -> None:
    """Anything else is damage, even with a right checksum, and is measured again."""
    assert not masked_losses._is_loss([0, 1], math.nan)
    assert not masked_losses._is_loss(["0", 1], 2.5)
    assert masked_losses._is_loss([0, 1], 2.5)


def test_a_loss_that_is_no_number_is_an_error() -> None:
    """In one line, with the remedy; samples of one token have no loss."""
    session = Session(small(), calibration=TOKENS[:, :1])
    with pytest.raises(NumericalError, match="the calibration loss is nan") as caught:
        session.plan(strategy())
    assert "2 tokens or more" in caught.value.hint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"score": "flap", "steps": 5}, "steps needs score: policy_gradient"),
        ({"learning_rate": 0.01}, "learning_rate needs score: policy_gradient"),
        ({"estimator": "released"}, "estimator needs score: policy_gradient"),
        ({"score": "policy_gradient", "steps": 0}, "greater than or equal to 1"),
        ({"score": "policy_gradient", "learning_rate": math.nan}, "less than or equal to 1"),
        ({"score": "policy_gradient", "estimator": "biased"}, "'unbiased' or 'released'"),
    ],
)
def test_options_of_the_policy_gradient_are_its_own(options: dict[str, Any], message: str) -> None:
    """Refused when the recipe is read; what is written down with its defaults is not."""
    with pytest.raises(ValidationError, match=message):
        WidthOptions.model_validate(options)
    for score in ("flap", "policy_gradient"):
        written = WidthOptions.model_validate({"score": score}).model_dump(mode="json")
        assert WidthOptions.model_validate(written).score == score


def test_only_the_policy_gradient_writes_trials() -> None:
    """Other scores of the strategy need no folder for them."""
    assert strategy().keeps_trials
    assert not Width(WidthOptions(), Target(ratio=0.2)).keeps_trials
