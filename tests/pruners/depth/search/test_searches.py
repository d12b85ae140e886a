"""Best-first and budgeted search against brute force, on costs that are made up."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from slm_plugin.pruners.depth.search.best_first import adjacent_merges, best_first
from slm_plugin.pruners.depth.search.budgeted import budgeted, least_sum
from slm_plugin.pruners.depth.search.runs import Measured, Rules, Run, Runs

Windows = frozenset[tuple[int, int]]


class MadeUp:
    """A measure on random values that counts its trials and gives up when told to."""

    def __init__(self, value: Callable[[Windows], float]) -> None:
        self.value, self.trials, self.given_up = value, 0, 0

    def __call__(
        self,
        first: int,
        last: int,
        rest: Runs,
        *,
        base: Runs = (),
        bound: float | None = None,
    ) -> Measured:
        """One trial."""
        self.trials += 1
        windows = frozenset({(first, last), *((run.first, run.last) for run in rest)})
        value = self.value(windows)
        hopeless = bound is not None and value <= bound
        self.given_up += hopeless
        return Measured(Run(first, last, "mean"), value, 1 if hopeless else None)


def noisy(seed: int) -> Callable[[Windows], float]:
    """A value for every set of windows, the same when asked again."""
    return lambda windows: -random.Random(f"{seed} {sorted(windows)}").random() * len(windows)


def additive(seed: int) -> Callable[[Windows], float]:
    """A value that is a sum over windows: what dynamic programming is exact for."""
    return lambda windows: sum(
        -((last - first) ** 1.5) * random.Random(f"{seed} {first} {last}").random()
        for first, last in windows
    )


def partitions(first: int, last: int) -> Iterator[Windows]:
    """Every set of disjoint windows inside layers first..last."""
    if first >= last:
        yield frozenset()
        return
    yield from partitions(first + 1, last)
    for end in range(first + 1, last + 1):
        for rest in partitions(end + 1, last):
            yield rest | {(first, end)}


def windows_of(runs: Runs) -> Windows:
    """Windows without their rules."""
    return frozenset((run.first, run.last) for run in runs)


def removed(windows: Windows) -> int:
    """Layers that windows take away."""
    return sum(last - first for first, last in windows)


@given(seed=st.integers(0, 10_000), wanted=st.integers(1, 5))
def test_greedy_takes_the_best_child_at_every_step(seed: int, wanted: int) -> None:
    """Each accepted trial is the best of all sets of windows one merge away."""
    rules, value = Rules(8, protect_first=1, protect_last=1), noisy(seed)
    found = best_first(rules, MadeUp(value), wanted=wanted)
    state: Windows = frozenset()
    for trial in found.trials:
        children = [
            child
            for child in partitions(1, 6)
            if removed(child) == removed(state) + 1
            # A child absorbs at most two windows into one and leaves the others alone.
            and all(any(a <= w[0] and w[1] <= b for a, b in child) for w in state)
            and len(child - state) == 1
        ]
        best = max(children, key=value)
        state = frozenset({(trial.first, trial.last), *trial.committed})
        assert state == best
        assert trial.similarity == value(best)
    assert windows_of(found.runs) == state
    assert found.removed == wanted


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), wanted=st.integers(1, 4))
def test_a_beam_that_holds_everything_finds_the_best_of_all(seed: int, wanted: int) -> None:
    """With no state dropped, the result is that of brute force over all sets of windows."""
    rules, value = Rules(7, protect_first=0, protect_last=1), noisy(seed)
    found = best_first(rules, MadeUp(value), wanted=wanted, beam_width=1000)
    best = max((w for w in partitions(0, 5) if removed(w) == wanted), key=value)
    assert value(windows_of(found.runs)) == value(best)


@given(seed=st.integers(0, 10_000), width=st.integers(1, 4))
def test_giving_up_on_hopeless_trials_changes_nothing(seed: int, width: int) -> None:
    """A measure that never gives up leads to the same runs."""
    rules, value = Rules(8, protect_first=0, protect_last=1), noisy(seed)
    eager = MadeUp(value)
    patient = MadeUp(value)
    patient_call = lambda *a, base=(), bound=None: patient(*a, base=base)  # noqa: E731
    assert best_first(rules, eager, wanted=3, beam_width=width) == best_first(
        rules, patient_call, wanted=3, beam_width=width
    )
    assert eager.given_up > 0
    assert patient.given_up == 0


def test_a_threshold_ends_the_greedy_search() -> None:
    """Merging goes on while the best child is above the threshold, and not one step further."""
    rules = Rules(8, protect_first=0, protect_last=1)
    by_size = MadeUp(lambda windows: -float(removed(windows)))
    found = best_first(rules, by_size, threshold=-3.5)
    assert found.removed == 3
    assert best_first(rules, by_size, threshold=-0.5).runs == ()


def test_adjacent_merges_are_all_there_are() -> None:
    """Neighbours may be layers or runs; protected layers are neither."""
    rules = Rules(8, protect_first=1, protect_last=2)
    runs = (Run(2, 3, "mean"),)
    found = [(first, last, windows_of(rest)) for first, last, rest in adjacent_merges(rules, runs)]
    assert found == [
        (4, 5, frozenset({(2, 3)})),
        (2, 4, frozenset()),
        (1, 3, frozenset()),
    ]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), layers=st.integers(4, 9), data=st.data())
def test_budgeted_is_the_best_sum_of_all(seed: int, layers: int, data: st.DataObject) -> None:
    """Dynamic programming finds the least sum that brute force finds, at exactly that size."""
    rules = Rules(layers, protect_first=1, protect_last=1)
    wanted = data.draw(st.integers(1, rules.most))
    value = additive(seed)
    found = budgeted(rules, MadeUp(value), wanted, 0.0)
    best = max((w for w in partitions(1, rules.top) if removed(w) == wanted), key=value)
    assert found.removed == wanted
    assert value(windows_of(found.runs)) == pytest.approx(value(best))


def test_budgeted_tries_every_window_once() -> None:
    """All windows that a budget of two allows, and then the chosen ones on top of each other."""
    rules = Rules(6, protect_first=0, protect_last=1)
    measure = MadeUp(additive(1))
    found = budgeted(rules, measure, 2, 0.0)
    pairs_and_triples = 4 + 3
    assert measure.trials == pairs_and_triples + len(found.runs)


def test_least_sum_prefers_what_it_is_told_is_cheap() -> None:
    """Two cheap pairs beat one dear triple, and the other way round."""
    rules = Rules(6, protect_first=0, protect_last=1)
    costs = {w: 1.0 for w in itertools.combinations(range(5), 2)}
    cheap_pairs = {**costs, (0, 1): 0.1, (3, 4): 0.1}
    assert least_sum(cheap_pairs, rules, 2) == (pytest.approx(0.2), [(0, 1), (3, 4)])
    assert least_sum({**costs, (1, 3): 0.1}, rules, 2) == (pytest.approx(0.1), [(1, 3)])


@pytest.mark.parametrize("width", [1, 3])
def test_of_equal_merges_the_first_tried_is_followed(width: int) -> None:
    """Where all cost the same, merging begins at the top and goes on with what it made."""
    rules = Rules(7, protect_first=0, protect_last=1)
    alike = MadeUp(lambda windows: -1.0)
    found = best_first(rules, alike, wanted=2, beam_width=width)
    assert windows_of(found.runs) == {(3, 5)}


def test_of_equal_sums_the_windows_from_the_bottom_are_chosen() -> None:
    """Two layers of a pair each, or of one triple, all at one price: the same choice every time."""
    rules = Rules(6, protect_first=0, protect_last=1)
    flat = {w: float(w[1] - w[0]) for w in itertools.combinations(range(5), 2)}
    assert least_sum(flat, rules, 1) == (1.0, [(0, 1)])
    cost, windows = least_sum(dict(reversed(flat.items())), rules, 2)
    assert (cost, windows) == least_sum(flat, rules, 2)
    assert (cost, max(last for _, last in windows)) == (2.0, 2)
