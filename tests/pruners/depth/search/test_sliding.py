"""The walk as pure decisions, on similarities that are made up."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

from hypothesis import given, settings
from hypothesis import strategies as st

from slm_plugin.pruners.depth.search.runs import Found, Measure, Measured, Run, Runs
from slm_plugin.pruners.depth.search.sliding import WalkRules, walk, walk_to_size

Window = tuple[int, int]


def rules(layers: int = 10, **changes: object) -> WalkRules:
    """The default rules, with changes."""
    defaults = {"protect_first": 0, "protect_last": 1}
    return WalkRules(layers=layers, **{**defaults, **changes})  # type: ignore[arg-type]


def measure_by(similarity: Callable[[int, int, tuple[Window, ...]], float]) -> Measure:
    """A measure that computes nothing."""

    def measure(
        first: int, last: int, rest: Runs, *, base: Runs = (), bound: float | None = None
    ) -> Measured:
        committed = tuple((run.first, run.last) for run in rest)
        return Measured(Run(first, last, "telescoped"), similarity(first, last, committed))

    return measure


def windows(found: Found) -> tuple[Window, ...]:
    """The merged windows without their rules."""
    return tuple((run.first, run.last) for run in found.runs)


def made_up(seed: int) -> Measure:
    """A similarity that falls with the window's size, and is the same when asked again."""

    def similarity(first: int, last: int, committed: tuple[Window, ...]) -> float:
        # A window of one layer merges nothing: the state is that of the committed windows.
        runs = (*committed, (first, last)) if first < last else committed
        noise = random.Random(f"{seed} {runs}").uniform(0, 0.2)
        removed = sum(high - low for low, high in runs)
        return 1 - 0.06 * removed - noise if removed else 1.0

    return measure_by(similarity)


# Only runs inside layers 3..7 merge well, at no cost at all.
planted = measure_by(lambda first, last, rest: 1.0 if first >= 3 and last <= 7 else 0.5)


def test_planted_redundancy_is_found_in_nine_evaluations() -> None:
    """The card's toy: ten layers, 3..7 redundant, threshold 0.9999 gives the run (3, 7)."""
    found = walk(rules(released=True), 0.9999, planted)
    assert windows(found) == ((3, 7),)
    assert found.removed == 4
    assert len(found.trials) == 9


def test_released_loop_loses_a_window_that_grows_to_the_bottom() -> None:
    """A threshold below every similarity prunes nothing; by the mended walk two layers stay."""
    everything = measure_by(lambda first, last, committed: 0.5)
    assert walk(rules(released=True), -1.1, everything).runs == ()
    flushed = walk(rules(), -1.1, everything)
    assert windows(flushed) == ((0, 8),)
    assert 10 - flushed.removed == 2


def test_nothing_merges_above_one() -> None:
    """Threshold 1.01 makes exactly L - 2 trials and merges nothing."""
    found = walk(rules(released=True), 1.01, made_up(0))
    assert windows(found) == ()
    assert len(found.trials) == 8


def test_the_trial_after_a_commit_decides_nothing() -> None:
    """Leaving the released loop's idle trial out changes no window that it commits."""
    for seed in range(30):
        idle = walk(rules(released=True), 0.75, made_up(seed))
        lean = walk(rules(), 0.75, made_up(seed))
        assert windows(idle) == windows(lean)[: len(idle.runs)]
        assert len(lean.runs) - len(idle.runs) in (0, 1)
        assert len(idle.trials) == len(lean.trials) + sum(t.first == t.last for t in idle.trials)


def test_protected_layers_are_never_touched() -> None:
    """No trial and no window names a protected layer."""
    for seed in range(20):
        found = walk(rules(12, protect_first=3, protect_last=2), 0.6, made_up(seed))
        touched = [i for t in found.trials for i in (t.first, t.last)]
        assert min(touched) >= 3 and max(touched) <= 9
        assert all(3 <= first < last <= 9 for first, last in windows(found))


@given(
    seed=st.integers(0, 10_000),
    layers=st.integers(4, 14),
    threshold=st.floats(-1.2, 1.2),
    released=st.booleans(),
)
def test_windows_are_disjoint_runs_in_descending_order(
    seed: int, layers: int, threshold: float, released: bool
) -> None:
    """Whatever the similarities, windows never overlap and never include the last layer."""
    found = walk(rules(layers, released=released), threshold, made_up(seed))
    edges = [edge for first, last in windows(found) for edge in (last, first)]
    assert all(a > b for a, b in itertools.pairwise(edges))
    assert all(last < layers - 1 for _, last in windows(found))
    # Every window is a trial that was accepted: nothing merges untried.
    good = {(t.first, t.last) for t in found.trials if t.accepted}
    assert set(windows(found)) <= good


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), layers=st.integers(4, 14), data=st.data())
def test_a_wanted_size_is_always_reached_exactly(
    seed: int, layers: int, data: st.DataObject
) -> None:
    """Every size that protection allows is reached, cut to the layer."""
    lean = rules(layers)
    wanted = data.draw(st.integers(1, lean.most))
    chosen = walk_to_size(lean, wanted, made_up(seed), 1.0)
    assert chosen.removed == wanted
    assert set(windows(chosen)) <= {(t.first, t.last) for t in chosen.trials if t.accepted}


@given(seed=st.integers(0, 10_000), threshold=st.floats(0, 1), wanted=st.integers(1, 8))
def test_a_stopped_walk_is_the_beginning_of_the_whole_one(
    seed: int, threshold: float, wanted: int
) -> None:
    """Stopping at a size changes no decision before it, and is only missed when out of reach."""
    lean = rules(12)
    whole = walk(lean, threshold, made_up(seed))
    stopped = walk(lean, threshold, made_up(seed), wanted)
    assert stopped.trials == whole.trials[: len(stopped.trials)]
    assert stopped.removed == min(wanted, whole.removed)


@settings(deadline=None)
@given(costs=st.lists(st.integers(1, 12), min_size=7, max_size=7), wanted=st.integers(1, 7))
def test_the_search_finds_the_best_threshold_of_a_monotone_walk(
    costs: list[int], wanted: int
) -> None:
    """Where only the dearest merged border counts, the cheapest borders merge, from the top."""

    def similarity(first: int, last: int, committed: tuple[Window, ...]) -> float:
        # Border b lies between the layers b and b + 1. A walk accepts each border for itself, so
        # that a lower threshold never removes fewer layers.
        merged = [b for low, high in (*committed, (first, last)) for b in range(low, high)]
        return 1 - max((costs[b] for b in merged), default=0) / 20

    measure = measure_by(similarity)
    lean = rules(9)
    chosen = walk_to_size(lean, wanted, measure, 1.0)
    dearest = sorted(costs)[wanted - 1]
    cheapest = [b for b in reversed(range(7)) if costs[b] <= dearest][:wanted]
    assert [b for low, high in windows(chosen) for b in reversed(range(low, high))] == cheapest
    assert chosen.threshold is not None
    assert all(t.accepted == (t.similarity > chosen.threshold) for t in chosen.trials)
    # No higher threshold would do: with equality a trial is rejected.
    assert walk(lean, 1 - dearest / 20, measure).removed < wanted


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), wanted=st.integers(1, 6))
def test_the_stated_threshold_leads_to_the_stated_walk(seed: int, wanted: int) -> None:
    """A reader who walks with the plan's threshold makes the plan's trials."""
    lean = rules(9)
    chosen = walk_to_size(lean, wanted, made_up(seed), 1.0)
    assert chosen.threshold is not None
    again = walk(lean, chosen.threshold, made_up(seed), wanted)
    assert (again.trials, again.runs) == (chosen.trials, chosen.runs)
