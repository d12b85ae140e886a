"""Best-first search: repeatedly merge the two adjacent runs of layers with the best value.

The published walk tries one window at a time and accepts the first that passes the threshold. This
search tries all adjacent merges and takes the best. A beam keeps several partly merged models.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from slm_plugin.plans import Trial
from slm_plugin.pruners.depth.search.runs import Found, Measure, Measured, Rules, Run, Runs


@dataclass(frozen=True, slots=True)
class _State:
    """A partly merged model and the trials that led to it."""

    runs: Runs
    trials: tuple[Trial, ...]
    value: float


def best_first(
    rules: Rules,
    measure: Measure,
    *,
    wanted: int | None = None,
    threshold: float = -math.inf,
    beam_width: int = 1,
) -> Found:
    """Merge two adjacent runs at a time, those that keep the model most similar to the original.

    Args:
        rules: The layers that may merge.
        measure: Compares the merged model with the original one.
        wanted: Number of layers to remove; each merge removes one.
        threshold: A merge is accepted when its value is greater.
        beam_width: Number of partly merged models kept; 1 is the greedy search.
    """
    states = [_State((), (), math.inf)]
    for _ in range(rules.most if wanted is None else wanted):
        better = _grown(rules, states, measure, threshold, beam_width)
        if not better:
            break
        states = better
    best = states[0]
    beam = f"the {beam_width} best models were" if beam_width > 1 else "the best model was"
    note = f"at every step all merges of two adjacent runs were tried and {beam} kept"
    return Found(best.runs, best.trials, threshold if math.isfinite(threshold) else None, (note,))


def _grown(
    rules: Rules, states: list[_State], measure: Measure, threshold: float, beam_width: int
) -> list[_State]:
    """The best models with one more merge, best first; ties in the order of trial."""
    beam: list[_State] = []
    seen: set[frozenset[tuple[int, int]]] = set()
    for state in states:
        for first, last, rest in adjacent_merges(rules, state.runs):
            windows = frozenset({(first, last), *((run.first, run.last) for run in rest)})
            if windows in seen:
                continue
            seen.add(windows)
            # Early stopping: the trial ends once it cannot enter the beam.
            bound = beam[-1].value if len(beam) == beam_width else threshold
            tried: Measured = measure(first, last, rest, base=state.runs, bound=bound)
            if tried.value > bound and tried.samples is None:
                trials = (*state.trials, tried.trial(rest, accepted=True))
                beam.append(_State((*rest, tried.run), trials, tried.value))
                beam.sort(key=lambda made: -made.value)
                del beam[beam_width:]
    return beam


def adjacent_merges(rules: Rules, runs: Runs) -> Iterator[tuple[int, int, Runs]]:
    """Every merge of two adjacent runs, from the top down.

    Yields:
        First and last layer of the merged run, and the other runs.
    """
    starts: dict[int, Run] = {run.first: run for run in runs}
    units: list[tuple[int, int]] = []
    index = rules.protect_first
    while index <= rules.top:
        last = starts[index].last if index in starts else index
        units.append((index, last))
        index = last + 1
    for (first, _), (_, last) in reversed(list(itertools.pairwise(units))):
        if not rules.alike(first, last):
            continue
        yield first, last, tuple(run for run in runs if run.last < first or run.first > last)
