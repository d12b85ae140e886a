"""Shapley values against averages over all orders, and the axioms that define them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch

from slm_plugin.errors import NumericalError
from slm_plugin.plans import DropLayers, PruningPlan
from slm_plugin.pruners.depth.search.runs import DROP
from slm_plugin.pruners.depth.search.trials import Trials
from slm_plugin.pruners.depth.shapley import (
    TRUNCATION,
    Shapley,
    ShapleyOptions,
    estimated_values,
    exact_values,
    losses_in_turn,
    value_function,
)
from slm_plugin.surgery.layers import apply_layers
from slm_plugin.target import Target
from tests.pruners.depth.strategies import (
    make_identity,
    mean_loss,
    own_text,
    planned,
    removed,
    session_of,
)
from tests.tiny import make_model

PLAYERS = range(2, 7)


def by_hand(lost: tuple[int, ...]) -> float:
    """A game of five in which players help and hinder one another."""
    worth = 10.0 - sum(lost) / 3
    if {2, 5} <= set(lost):
        worth -= 2.0
    if {3, 4} <= set(lost):
        worth += 1.5
    return worth * 0.8 ** len(lost)


def over_all_orders(players: range, worth: Callable[[tuple[int, ...]], float]) -> list[float]:
    """What a player takes along when it goes, mean over all orders of going."""
    totals = dict.fromkeys(players, 0.0)
    for order in itertools.permutations(players):
        for place, player in enumerate(order):
            before = worth(tuple(sorted(order[:place])))
            totals[player] += before - worth(tuple(sorted(order[: place + 1])))
    return [totals[player] / math.factorial(len(players)) for player in players]


def scores(plan: PruningPlan) -> list[float]:
    """The scores of all layers."""
    assert plan.layer_scores is not None
    return list(plan.layer_scores.scores)


def test_exact_values_are_the_mean_over_all_orders() -> None:
    """Five players and 120 orders of a game whose worths were made up."""
    found = exact_values(PLAYERS, by_hand)
    assert found == pytest.approx(over_all_orders(PLAYERS, by_hand))
    assert sum(found) == pytest.approx(by_hand(()) - by_hand(tuple(PLAYERS)))


@pytest.mark.parametrize("seed", range(3))
def test_the_estimate_of_an_additive_game_has_no_error(seed: int) -> None:
    """Where a player always adds the same, two pairs of orders give it."""
    shares = {player: 0.01 * player for player in PLAYERS}
    found = estimated_values(PLAYERS, lambda lost: 1 - sum(shares[p] for p in lost), 1, seed)
    assert found.values == pytest.approx(list(shares.values()))
    assert found.errors == pytest.approx([0] * 5, abs=1e-12)
    assert found.pairs == 2


def test_the_estimate_adds_up_and_its_errors_are_honest() -> None:
    """Efficiency holds in every order; most true values lie within two standard errors."""
    exact = exact_values(PLAYERS, by_hand)
    within = []
    for seed in range(40):
        found = estimated_values(PLAYERS, by_hand, 200, seed)
        assert sum(found.values) == pytest.approx(by_hand(()) - by_hand(tuple(PLAYERS)))
        triples = zip(found.values, exact, found.errors, strict=True)
        within += [abs(value - true) <= 2 * error for value, true, error in triples]
    assert 0.88 < sum(within) / len(within) < 0.99


def test_an_order_ends_when_nothing_is_left() -> None:
    """What goes after that is neither looked at nor worth anything."""
    asked: list[tuple[int, ...]] = []

    def worth(lost: tuple[int, ...]) -> float:
        asked.append(lost)
        return 1.0 if not lost else 0.5 if 4 not in lost else TRUNCATION / 2

    assert losses_in_turn([2, 4, 3], worth) == {2: 0.5, 4: 0.5 - TRUNCATION / 2}
    assert asked == [(), (2,), (2, 4)]


@pytest.mark.parametrize("samples", [64, 20])
def test_symmetry_and_dummy(samples: int) -> None:
    """Layers that do nothing have the value 0, exactly or estimated; equal players equal ones."""
    model = make_model()
    make_identity(model, [1, 4])
    found = scores(planned("shapley", model, 2, samples=samples))
    assert found[1] == found[4] == 0
    assert all(found[index] != 0 for index in (0, 2, 3, 5))
    alike = exact_values(range(4), lambda lost: 1 / (1 + len(lost)))
    assert alike == pytest.approx([(1 - 1 / 5) / 4] * 4)


def test_the_worth_is_that_of_whole_models(family: str) -> None:
    """Perplexity of the original over that of models that surgery took layers from."""
    trials = Trials(session_of(make_model(family)), "loss", DROP)
    worth = value_function(trials)
    dense = mean_loss(make_model(family))
    assert worth(()) == 1
    for lost in [(0,), (2, 5), (1, 3, 4), (0, 1, 2, 3, 4)]:
        model = make_model(family)
        apply_layers(model, [DropLayers(indices=lost)])
        assert worth(lost) == pytest.approx(math.exp(dense - mean_loss(model)), rel=1e-4)


def test_an_exact_plan_is_the_game_of_whole_models() -> None:
    """All 64 models; the lowest values go, lowest first, and all add up."""
    dense = mean_loss(make_model())
    known: dict[tuple[int, ...], float] = {(): 1.0}

    def worth(lost: tuple[int, ...]) -> float:
        if lost not in known:
            model = make_model()
            # Surgery leaves at least one layer: the worth of none is put there below.
            apply_layers(model, [DropLayers(indices=lost)])
            known[lost] = math.exp(dense - mean_loss(model))
        return known[lost]

    bare = make_model()
    bare.model.layers = torch.nn.ModuleList()
    known[tuple(range(6))] = math.exp(dense - mean_loss(bare))
    expected = over_all_orders(range(6), worth)
    plan = planned("shapley", make_model(), 3)
    assert scores(plan) == pytest.approx(expected, abs=2e-5)
    assert removed(plan) == sorted(range(6), key=lambda index: expected[index])[:3]
    assert sum(scores(plan)) == pytest.approx(1 - known[tuple(range(6))], abs=1e-4)
    assert "exact: all 64 coalitions" in plan.notes[2]


def test_an_estimated_plan_is_close_to_the_exact_one() -> None:
    """On the same models, within four of its standard errors, and with fewer of them."""
    model = make_model()
    tokens = own_text(model)
    with torch.no_grad():
        # Certain enough to lose something, and not all at once.
        model.model.norm.weight.div_(8)
    exact = exact_values(
        range(6), value_function(Trials(session_of(model, calibration=tokens), "loss", DROP))
    )
    worth = value_function(Trials(session_of(model, calibration=tokens), "loss", DROP))
    found = estimated_values(range(6), worth, 600, 1)
    for value, true, error in zip(found.values, exact, found.errors, strict=True):
        assert abs(value - true) < 4 * error + TRUNCATION
        assert error < 0.05
    plan = planned("shapley", model, 2, tokens=tokens, samples=63)
    assert "estimated on" in plan.notes[2] and "standard errors" in plan.notes[2]


def test_the_seed_decides_the_estimate() -> None:
    """Same seed, same plan to the last digit; another seed, other values."""

    def made(seed: int) -> PruningPlan:
        session = session_of(make_model(), seed=seed)
        return Shapley(ShapleyOptions(samples=20), Target(layers_removed=2)).plan(session)

    first = made(1)
    torch.manual_seed(99)
    assert made(1) == first
    assert scores(made(2)) != scores(first)


def test_protected_layers_are_no_players() -> None:
    """They stay in every model that is looked at, and stand at 1, the worth of the whole."""
    model = make_model()
    plan = planned("shapley", model, 2, protect_first=1, protect_last=2)
    found = scores(plan)
    assert [found[0], found[4], found[5]] == [1, 1, 1]
    worth = value_function(Trials(session_of(make_model()), "loss", DROP))
    assert found[1:4] == pytest.approx(over_all_orders(range(1, 4), worth))
    assert "all 8 coalitions" in plan.notes[2]


def test_a_model_is_looked_at_once() -> None:
    """Orders that lose the same layers share the trial, whichever went first."""
    trials = Trials(session_of(make_model()), "loss", DROP)
    found = estimated_values(range(6), value_function(trials), 300, 3)
    assert found.pairs * 6 > 63 >= len(trials.made)


def test_a_worth_that_is_no_number_is_refused() -> None:
    """NaN is not the lowest value."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(NumericalError):
        planned("shapley", model, 1)
