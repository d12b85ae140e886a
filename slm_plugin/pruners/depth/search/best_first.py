"""Best-first merging: of all adjacent runs of layers, merge those that cost least, again and again.

Beside the published walk, which looks at one window at a time and takes the first that is good
enough, this looks at every merge that the model allows and takes the best. With a beam, several
partly merged models are followed at once.
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
    """A partly merged model and how it came about."""

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
    """Merge two adjacent runs at a time, whichever leaves the model most alike to the original.

    Args:
        rules: What the search may do.
        measure: Compares the model with a run merged, on top of others, with the original one.
        wanted: Layers to take away; each merge takes one.
        threshold: No merge is made whose value is not greater.
        beam_width: Partly merged models that are followed at once; 1 is the greedy search.
    """
    states = [_State((), (), math.inf)]
    for _ in range(rules.most if wanted is None else wanted):
        better = _grown(rules, states, measure, threshold, beam_width)
        if not better:
            break
        states = better
    best = states[0]
    kept = f"the {beam_width} best models are" if beam_width > 1 else "the best model is"
    note = f"at every step all merges of two adjacent runs were tried and {kept} followed"
    return Found(best.runs, best.trials, threshold if math.isfinite(threshold) else None, (note,))


def _grown(
    rules: Rules, states: list[_State], measure: Measure, threshold: float, beam_width: int
) -> list[_State]:
    """The best models with one layer less, best first; equal ones in the order of trial."""
    kept: list[_State] = []
    seen: set[frozenset[tuple[int, int]]] = set()
    for state in states:
        for first, last, rest in adjacent_merges(rules, state.runs):
            windows = frozenset({(first, last), *((run.first, run.last) for run in rest)})
            if windows in seen:
                continue
            seen.add(windows)
            # What cannot enter the beam need not be measured to its end.
            bar = kept[-1].value if len(kept) == beam_width else threshold
            tried: Measured = measure(first, last, rest, base=state.runs, hopeless_at=bar)
            if tried.value > bar and tried.samples is None:
                trials = (*state.trials, tried.trial(rest, accepted=True))
                kept.append(_State((*rest, tried.run), trials, tried.value))
                kept.sort(key=lambda made: -made.value)
                del kept[beam_width:]
    return kept


def adjacent_merges(rules: Rules, runs: Runs) -> Iterator[tuple[int, int, Runs]]:
    """Every merge of two neighbours, from the top down.

    Yields:
        First and last layer of the new run, and the runs that stay beside it.
    """
    starts: dict[int, Run] = {run.first: run for run in runs}
    units: list[tuple[int, int]] = []
    index = rules.protect_first
    while index <= rules.top:
        last = starts[index].last if index in starts else index
        units.append((index, last))
        index = last + 1
    for (first, _), (_, last) in reversed(list(itertools.pairwise(units))):
        yield first, last, tuple(run for run in runs if run.last < first or run.first > last)
