"""The walk as pure decisions, on similarities that are made up."""

from __future__ import annotations

import functools
import itertools
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from slm_plugin.pruners.depth.sliding import Rules, Similarity, Window, walk, walk_to_size


def rules(layers: int = 10, **changes: object) -> Rules:
    """The released rules, with changes."""
    released = {
        "protect_first": 0,
        "protect_last": 1,
        "flush_tail": False,
        "trial_after_commit": True,
    }
    return Rules(layers=layers, **{**released, **changes})  # type: ignore[arg-type]


def made_up(seed: int) -> Similarity:
    """A similarity that falls with the window's size, and is the same when asked again."""

    @functools.cache
    def similarity(first: int, last: int, committed: tuple[Window, ...]) -> float:
        # A window of one layer merges nothing: the state is that of the committed windows.
        runs = (*committed, (first, last)) if first < last else committed
        noise = random.Random(f"{seed} {runs}").uniform(0, 0.2)
        gone = sum(high - low for low, high in runs)
        return 1 - 0.06 * gone - noise if gone else 1.0

    return similarity


def planted(first: int, last: int, committed: tuple[Window, ...]) -> float:
    """Only runs inside layers 3..7 merge well, at no cost at all."""
    return 1.0 if first >= 3 and last <= 7 else 0.5


def test_planted_redundancy_is_found_in_nine_evaluations() -> None:
    """The card's toy: ten layers, 3..7 redundant, threshold 0.9999 gives the run (3, 7)."""
    found = walk(rules(), 0.9999, planted)
    assert found.windows == ((3, 7),)
    assert found.removed == 4
    assert len(found.trials) == 9


def test_released_loop_loses_a_window_that_grows_to_the_bottom() -> None:
    """A threshold below every similarity prunes nothing; with flush_tail two layers stay."""
    everything: Similarity = lambda first, last, committed: 0.5  # noqa: E731
    assert walk(rules(), -1.1, everything).windows == ()
    flushed = walk(rules(flush_tail=True), -1.1, everything)
    assert flushed.windows == ((0, 8),)
    assert 10 - flushed.removed == 2


def test_nothing_merges_above_one() -> None:
    """Threshold 1.01 makes exactly L - 2 trials and merges nothing."""
    found = walk(rules(), 1.01, made_up(0))
    assert found.windows == ()
    assert len(found.trials) == 8


def test_the_trial_after_a_commit_decides_nothing() -> None:
    """Leaving the released loop's idle trial out changes no window."""
    for seed in range(30):
        idle = walk(rules(trial_after_commit=True), 0.75, made_up(seed))
        lean = walk(rules(trial_after_commit=False), 0.75, made_up(seed))
        assert idle.windows == lean.windows
        assert len(idle.trials) == len(lean.trials) + sum(t.first == t.last for t in idle.trials)


def test_protected_layers_are_never_touched() -> None:
    """No trial and no window names a protected layer."""
    for seed in range(20):
        found = walk(
            rules(12, protect_first=3, protect_last=2, flush_tail=True), 0.6, made_up(seed)
        )
        touched = [i for t in found.trials for i in (t.first, t.last)]
        assert min(touched) >= 3 and max(touched) <= 9
        assert all(3 <= first < last <= 9 for first, last in found.windows)


@given(
    seed=st.integers(0, 10_000),
    layers=st.integers(4, 14),
    threshold=st.floats(-1.2, 1.2),
    flush=st.booleans(),
)
def test_windows_are_disjoint_runs_in_descending_order(
    seed: int, layers: int, threshold: float, flush: bool
) -> None:
    """Whatever the similarities, windows never overlap and never include the last layer."""
    found = walk(rules(layers, flush_tail=flush), threshold, made_up(seed))
    edges = [edge for first, last in found.windows for edge in (last, first)]
    assert all(a > b for a, b in itertools.pairwise(edges))
    assert all(last < layers - 1 for _, last in found.windows)
    # Every window is a trial that was accepted: nothing merges untried.
    good = {(t.first, t.last) for t in found.trials if t.accepted}
    assert set(found.windows) <= good


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10_000), layers=st.integers(4, 14), data=st.data())
def test_a_wanted_size_is_always_reached_exactly(
    seed: int, layers: int, data: st.DataObject
) -> None:
    """With flush_tail every size that protection allows is reached, cut to the layer."""
    lean = rules(layers, flush_tail=True, trial_after_commit=False)
    wanted = data.draw(st.integers(1, lean.most))
    chosen, _ = walk_to_size(lean, wanted, made_up(seed))
    assert chosen.removed == wanted
    assert set(chosen.windows) <= {(t.first, t.last) for t in chosen.trials if t.accepted}


@given(seed=st.integers(0, 10_000), threshold=st.floats(0, 1), wanted=st.integers(1, 8))
def test_a_stopped_walk_is_the_beginning_of_the_whole_one(
    seed: int, threshold: float, wanted: int
) -> None:
    """Stopping at a size changes no decision before it, and is only missed when out of reach."""
    lean = rules(12, flush_tail=True, trial_after_commit=False)
    whole = walk(lean, threshold, made_up(seed))
    stopped = walk(lean, threshold, made_up(seed), wanted)
    assert stopped.trials == whole.trials[: len(stopped.trials)]
    assert stopped.removed == min(wanted, whole.removed)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), wanted=st.integers(1, 6))
def test_the_search_finds_the_best_threshold_of_a_monotone_walk(seed: int, wanted: int) -> None:
    """Where size is monotone, the walk is that of the best threshold on a fine grid."""
    lean = rules(9, flush_tail=True, trial_after_commit=False)
    similarity = made_up(seed)
    grid = [i / 200 for i in range(-200, 201)]
    sizes = [walk(lean, threshold, similarity).removed for threshold in grid]
    if sizes != sorted(sizes, reverse=True):
        return
    chosen, _ = walk_to_size(lean, wanted, similarity)
    assert chosen.removed == wanted
    better = [t for t, size in zip(grid, sizes, strict=True) if size >= wanted]
    best = walk(lean, max(better), similarity, wanted)
    # The chosen threshold may lie between two points of the grid.
    assert chosen.windows == best.windows or chosen.threshold > best.threshold
