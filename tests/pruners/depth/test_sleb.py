"""SLEB against brute force over whole models, and what it may not do."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
from transformers import PreTrainedModel

from slm_plugin.models.head import Head
from slm_plugin.plans import DropLayers
from slm_plugin.pruners.depth.measures.criteria import CRITERIA
from slm_plugin.pruners.depth.search.runs import DROP, Run, Runs
from slm_plugin.pruners.depth.search.trials import Trials
from slm_plugin.pruners.depth.sleb import Sleb, SlebOptions, dropped_in_turn
from slm_plugin.surgery.layers import apply_layers
from slm_plugin.target import Target
from tests.pruners.depth.strategies import (
    TOKENS,
    make_identity,
    mean_loss,
    own_text,
    planned,
    removed,
    session_of,
)
from tests.tiny import make_model


def without(indices: tuple[int, ...], family: str = "llama", layers: int = 6) -> PreTrainedModel:
    """A fresh model that surgery took layers from."""
    model = make_model(family, num_hidden_layers=layers)
    if indices:
        apply_layers(model, [DropLayers(indices=indices)])
    return model


@functools.cache
def final_state(indices: tuple[int, ...]) -> torch.Tensor:
    """That of a model of eight layers without some."""
    with torch.inference_mode():
        found: torch.Tensor = without(indices, layers=8).model(TOKENS).last_hidden_state
    return found


def brute_force(family: str, wanted: int, layers: int = 6) -> tuple[list[int], list[float]]:
    """The greedy search over whole models: what goes, and how much the loss has then grown."""
    chosen: tuple[int, ...] = ()
    losses = []
    for _ in range(wanted):
        candidates = [i for i in range(1, layers - 1) if i not in chosen]
        found = {i: mean_loss(without((*chosen, i), family, layers)) for i in candidates}
        best = min(candidates, key=lambda i: (found[i], i))
        chosen = (*chosen, best)
        losses.append(found[best] - mean_loss(without((), family, layers)))
    return list(chosen), losses


@pytest.mark.parametrize("wanted", [2, 4])
def test_it_is_the_greedy_search_of_brute_force(family: str, wanted: int) -> None:
    """Same layers in the same order, and the same losses as whole models without them."""
    expected, losses = brute_force(family, wanted)
    plan = planned("sleb", make_model(family), wanted)
    assert removed(plan) == expected
    assert [-trial.similarity for trial in plan.trials] == pytest.approx(losses, abs=2e-5)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("base", [(), (3,), (1, 4), (2, 3, 7)])
def test_a_trial_equals_the_whole_shortened_model(criterion: str, base: tuple[int, ...]) -> None:
    """Every criterion, on top of other drops, up to the last layer, or with one taken back."""
    trials = Trials(session_of(make_model(num_hidden_layers=8)), criterion, DROP)
    runs: Runs = tuple(Run(i, i, DROP) for i in base)
    head, chosen = Head(make_model(num_hidden_layers=8).lm_head), CRITERIA[criterion]
    with torch.inference_mode():
        prepared = chosen.prepare(final_state(()), TOKENS, head)
        for rest in dict.fromkeys((runs, runs[1:], runs[:-1])):
            for index in (0, 5, 7):
                if index in base:
                    continue
                found = trials(index, index, rest, base=runs)
                hidden = final_state((*(run.first for run in rest), index))
                expected = float(chosen.compare(prepared, hidden, head).mean())
                assert found.value == pytest.approx(expected, abs=2e-5)


def test_drops_and_merges_of_the_same_layers_are_different_trials() -> None:
    """A dropped run of several layers is not the run merged, and not the model as it is."""
    session = session_of(make_model(num_hidden_layers=8))
    values = [
        Trials(session, "loss", rule)(3, 4, ()).value for rule in (DROP, "keep_low", "keep_high")
    ]
    assert len(set(values)) == 3
    alone = Trials(session, "loss", DROP)(3, 3, ())
    assert alone.value != 0
    assert Trials(session, "loss", "keep_low")(3, 3, ()).value == pytest.approx(0, abs=1e-6)


def test_the_loss_does_not_change_when_nothing_is_lost() -> None:
    """Layers that do nothing go first, the lowest of them first, at no loss."""
    model = make_model(num_hidden_layers=8)
    make_identity(model, [5, 2, 3])
    plan = planned("sleb", model, 4, tokens=own_text(model))
    assert removed(plan)[:3] == [2, 3, 5]
    assert [trial.similarity for trial in plan.trials[:3]] == [0, 0, 0]


def test_the_barriers_hold_until_they_are_lowered() -> None:
    """First and last layer stay by default, and may go when the options say so."""
    model = make_model()
    make_identity(model, [0, 5])
    assert set(removed(planned("sleb", model, 4))) == {1, 2, 3, 4}
    free = planned("sleb", model, 2, tokens=own_text(model), protect_first=0, protect_last=0)
    assert removed(free) == [0, 5]


@pytest.mark.parametrize("criterion", ["loss", "token_cosine"])
def test_hopeless_trials_stop_early_and_change_nothing(criterion: str) -> None:
    """Of many samples some trials see few, and the choice is that of whole trials."""
    model = make_model(num_hidden_layers=8)
    make_identity(model, [5])
    tokens = own_text(model)
    plan = planned("sleb", model, 3, tokens=tokens, criterion=criterion)
    stopped = [trial for trial in plan.explored if trial.samples is not None]
    assert stopped
    trials = Trials(session_of(model, calibration=tokens), criterion, DROP)

    def whole(first: int, last: int, rest: Runs, **asked: object) -> object:
        return trials(first, last, rest, base=rest)

    found = dropped_in_turn(range(1, 7), 3, whole)  # type: ignore[arg-type]
    assert [run.first for run in found.runs] == removed(plan)
    assert found.trials == plan.trials


def test_layers_run_no_oftener_than_the_search_needs() -> None:
    """A trial runs the layers above the dropped one, and a step's new inputs are computed once."""
    model = make_model(num_hidden_layers=8)
    forwards = 0

    def count(module: torch.nn.Module, args: tuple[torch.Tensor, ...], _output: object) -> None:
        nonlocal forwards
        forwards += len(args[0]) if type(module) is type(layer) else 0

    layer = model.model.layers[0]
    hook = torch.nn.modules.module.register_module_forward_hook(count)
    try:
        plan = planned("sleb", model, 3)
    finally:
        hook.remove()
    assert all(trial.samples is None for trial in plan.explored)
    order = removed(plan)
    needed = 8
    for step in range(3):
        dropped = order[:step]
        if dropped:
            needed += sum(i not in dropped for i in range(min(dropped), 8))
        for index in set(range(1, 7)) - set(dropped):
            needed += sum(i not in dropped for i in range(index + 1, 8))
    # Once more for the loss that the plan states.
    needed += sum(i not in order for i in range(min(order), 8))
    assert forwards == needed * len(TOKENS)


def test_a_killed_search_goes_on(tmp_path: pytest.TempPathFactory) -> None:
    """Trials are journalled as those of slm are, and every beginning ends in the same plan."""

    def plan() -> str:
        session = session_of(make_model(), journals=tmp_path)
        return Sleb(SlebOptions(), Target(layers_removed=3)).plan(session).to_json()

    expected = plan()
    (file,) = tmp_path.glob("*.jsonl")  # type: ignore[attr-defined]
    whole = file.read_text()
    assert plan() == expected and file.read_text() == whole
    lines = whole.splitlines(keepends=True)
    file.write_text("".join(lines[: len(lines) // 2]) + '{"runs": [[1, ')
    assert plan() == expected
    assert file.read_text() == whole


def test_the_plan_lists_every_trial_once() -> None:
    """Four candidates at the first step, three at the second; one of each decides."""
    plan = planned("sleb", make_model(), 2)
    assert len(plan.trials) == 2 and len(plan.explored) == 3 + 2
    seen = [(t.first, t.last, t.committed) for t in (*plan.trials, *plan.explored)]
    assert len(set(seen)) == len(seen)
    assert all(trial.rule == DROP for trial in plan.trials)
    for low, high in itertools.pairwise(plan.trials):
        assert high.committed == (*low.committed, (low.first, low.last))
