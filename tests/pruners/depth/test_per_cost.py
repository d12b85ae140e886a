"""A search that divides by what layers cost: against whole repaired models, and planted layers."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from slm_plugin.pruners.depth import repaired
from slm_plugin.pruners.depth.measures.criteria import CriterionName
from slm_plugin.pruners.depth.measures.layer_costs import layer_costs
from slm_plugin.pruners.depth.repaired import Repaired
from slm_plugin.pruners.depth.repaired_options import RepairedOptions
from slm_plugin.pruners.depth.search.repaired_trials import RepairedTrials, for_cost
from slm_plugin.pruners.depth.search.runs import JOIN, Run
from slm_plugin.target import Target
from tests.pruners.depth.strategies import (
    RECOVERY,
    judged_on,
    layer_outputs,
    mean_loss,
    planned,
    removed,
    session_of,
)
from tests.pruners.depth.test_repaired import LOWEST, Candidate, dropped, repaired_model
from tests.recovery.pruned import TOKENS
from tests.tiny import make_model

COSTS = (1.3, 0.6, 1.1, 0.7, 1.4, 0.9)


@pytest.mark.parametrize("costs", [COSTS, (1.0, 1.0, 9.0, 1.0, 1.0, 1e-3)])
@pytest.mark.parametrize("repair", [*RECOVERY, "none"])
def test_each_step_takes_the_least_loss_for_the_cost(repair: str, costs: tuple[float, ...]) -> None:
    """Of all candidates, by the losses of whole models, pruned and repaired.

    At a second step of those above the first gap: one below it changes the repair of that gap,
    which a search makes anew only when it takes the candidate.
    """
    model = make_model()
    session = session_of(model, calibration=TOKENS, batch_tokens=48)
    trials = RepairedTrials(session, repair, "loss", costs)
    every = [LOWEST, *(dropped(layer) for layer in range(1, 6))]
    assert trials.best(every, whole=True).candidate == expected(repair, costs, every)
    trials.commit(trials.best([dropped(1)], whole=True))
    above = [dropped(layer, layer - 2) for layer in range(2, 6)]
    assert trials.best(above, whole=True).candidate == expected(repair, costs, above, dropped(1))


def expected(
    repair: str, costs: tuple[float, ...], given: list[Candidate], *done: Candidate
) -> Candidate:
    """The best candidate behind others."""
    tokens = judged_on(repair)
    now = mean_loss(model_without(repair, *done), tokens)

    def rank(one: Candidate) -> float:
        after = mean_loss(model_without(repair, one, *done), tokens)
        return for_cost(now - after, costs[one.run.last])

    return max(given, key=rank)


def model_without(repair: str, *done: Candidate) -> PreTrainedModel:
    """The model without some layers, repaired."""
    gone = sorted(one.run.first for one in done)
    if repair == "none" or (repair != "rescale" and gone == list(range(len(gone)))):
        model = make_model()
        left = [layer for i, layer in enumerate(model.model.layers) if i not in gone]
        model.model.layers = torch.nn.ModuleList(left)
        return model
    return repaired_model(repair, *done)


@pytest.mark.parametrize("judge", ["logit_kl", None])
def test_what_was_lost_before_is_no_part_of_a_loss(judge: CriterionName | None) -> None:
    """The order of two candidates turns where the cost equals the ratio of what each adds."""
    session = session_of(make_model(), calibration=TOKENS)
    given = [dropped(layer, layer - 2) for layer in (3, 4)]

    def behind(costs: tuple[float, ...]) -> RepairedTrials:
        trials = RepairedTrials(session, "none", judge, costs)
        trials.commit(trials.best([dropped(1)], whole=True))
        return trials

    plain = behind(())
    lost = [-plain.best([one], whole=True).value for one in given]
    if judge is None:
        added = [loss - plain.stack.lack_now(one) for loss, one in zip(lost, given, strict=True)]
    else:
        before = -plain.made[0].value
        added = [loss - before for loss in lost]
    assert min(added) > 0
    for factor, best in ((0.99, 0), (1.01, 1)):
        costs = [1.0] * 6
        costs[4] = factor * added[1] / added[0]
        assert behind(tuple(costs)).best(given, whole=True).candidate == given[best]


def test_what_is_told_of_a_trial_is_its_loss() -> None:
    """Not what ranks it."""
    session = session_of(make_model(), calibration=TOKENS)
    given = [dropped(2), dropped(4)]
    plain = RepairedTrials(session, "boundary", "loss")
    costly = RepairedTrials(session, "boundary", "loss", COSTS)
    plain.best(given, whole=False)
    costly.best(given, whole=False)
    assert costly.made == plain.made


@pytest.mark.parametrize(("gain", "cost", "expected"), [(-2, 0.5, -4), (-2, 4, -0.5), (2, 4, 8)])
def test_losses_are_divided_and_gains_multiplied(gain: float, cost: float, expected: float) -> None:
    """So that to save more is better for either."""
    assert for_cost(gain, cost) == expected


def test_the_estimate_is_what_the_state_lacks_more_than_now() -> None:
    """For the cost; now is with the layers that are left, before the candidate goes."""
    model, tokens = make_model(), TOKENS
    trials = RepairedTrials(session_of(model, calibration=tokens), "none", None, COSTS)
    dense = layer_outputs(model, tokens)
    assert trials.stack.lack_now(dropped(4)) == 0
    trials.commit(trials.best([dropped(2)], whole=True))
    pruned = copy.deepcopy(model)
    del pruned.model.layers[2]
    for index, layer in enumerate(pruned.model.layers):
        layer.self_attn.layer_idx = index
    states = layer_outputs(pruned, tokens)

    def error(state: torch.Tensor, wanted: torch.Tensor) -> float:
        return float((state - wanted).norm() / wanted.norm())

    for layer, at in ((3, 1), (4, 2), (5, 3)):
        candidate = Candidate(dropped(layer).run, at)
        now = error(states[at + 2], dense[layer + 1])
        lack = error(states[at + 1], dense[layer + 1])
        assert trials.stack.lack_now(candidate) == pytest.approx(now, rel=1e-5)
        assert trials.estimate(candidate) == pytest.approx(
            for_cost(now - lack, COSTS[layer]), rel=1e-4
        )


@pytest.mark.parametrize("judge", ["kl", "loss", "state"])
def test_equal_costs_change_nothing(judge: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of one kind of layers, and one whose kinds take as long."""
    as_long = partial(layer_costs, timer=lambda session, *_: [2.0] * len(session.view.layers))
    monkeypatch.setattr(repaired, "layer_costs", as_long)
    for name in ("llama", "gemma3"):
        options: dict[str, Any] = {"judge": judge}
        plain = planned("repaired", make_model(name), 3, **options)
        per = planned("repaired", make_model(name), 3, per="latency", **options)
        assert per.operations == plain.operations and per.trials == plain.trials
        assert "all layers cost the same" in per.notes[-1]


@pytest.mark.parametrize("judge", ["kl", "state"])
def test_of_layers_that_do_nothing_the_costly_one_goes(
    judge: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is lost where another goes; the plan for less is the beginning of that for more."""
    model = make_model("gemma3")
    assert model.config.layer_types[2] == "full_attention"
    costs = tuple(4.0 if kind == "full_attention" else 0.1 for kind in model.config.layer_types)
    monkeypatch.setattr(repaired, "layer_costs", lambda *_: costs)
    plans = [
        planned("repaired", model, wanted, per="latency", judge=judge, screen="all")
        for wanted in (1, 2, 3)
    ]
    assert {*removed(plans[1])} == {2, 5}
    for less, more in itertools.pairwise(plans):
        assert more.operations[: len(less.operations)] == less.operations


def test_a_merge_costs_its_upper_layer() -> None:
    """Whose attention goes, of a join too."""
    session = session_of(make_model(), calibration=TOKENS)
    cheap = RepairedTrials(session, "none", "loss", (1.0, 1.0, 1.0, 1e-9, 1.0, 1.0))
    dear = RepairedTrials(session, "none", "loss", (1.0, 1.0, 1.0, 1e9, 1.0, 1.0))
    for rule in ("mean", JOIN):
        given = [Candidate(Run(2, 3, rule), 2), dropped(5), dropped(2)]
        assert cheap.best(given, whole=True).candidate != given[0]
        assert dear.best(given, whole=True).candidate == given[0]


def test_times_that_were_kept_give_the_same_plan(tmp_path: Path) -> None:
    """A killed search goes on with the times of its first attempt."""

    def plan() -> str:
        session = session_of(make_model("gemma3"), calibration=TOKENS, journals=tmp_path)
        options = RepairedOptions(per="latency", prompt_tokens=20, new_tokens=2)
        return Repaired(options, Target(layers_removed=3)).plan(session).to_json()

    assert plan() == plan()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"per": "latency", "polish": 3}, "leave out `per`"),
        ({"prompt_tokens": 5}, "`prompt_tokens` has no effect without `per: latency`"),
        ({"per": "parameter", "batch_size": 2}, "`batch_size` has no effect"),
        ({"per": "second"}, "'layer', 'parameter' or 'latency'"),
    ],
)
def test_options_without_effect_are_mistakes(options: dict[str, Any], message: str) -> None:
    """And so is a unit of no name."""
    with pytest.raises(ValidationError, match=message):
        RepairedOptions(**options)
