"""The search of Sliding Layer Merging, from the top of a decoder to its bottom.

Source: SLM (arXiv 2502.19159), algorithm 1, as in the authors' released code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from slm_plugin.plans import Trial
from slm_plugin.pruners.depth.search.runs import Found, Measure, Measured, Rules, Run, removed


@dataclass(frozen=True, slots=True)
class WalkRules(Rules):
    """Rules of the walk.

    Attributes:
        released: Walk as the released code does. It discards a window that is still growing at
            the bottom, evaluates the one-layer window after a merge, and evaluates every trial on
            all samples.
    """

    released: bool = False


def walk(rules: WalkRules, threshold: float, measure: Measure, wanted: int | None = None) -> Found:
    """Slide a window down the decoder and merge while the model stays similar to the original.

    Args:
        rules: Rules of the walk.
        threshold: A merge is accepted when its value is greater.
        measure: Compares the merged model with the original one.
        wanted: Stop when this many layers are removed. Every accepted trial removes one more
            layer, so the walk stops at exactly that size.
    """
    trials: list[Trial] = []
    runs: list[Run] = []
    growing: Run | None = None
    # A search for a size needs exact values to find the interval of thresholds of each walk, so it
    # has no early stopping.
    bound = None if rules.released or wanted is not None else threshold
    high = rules.top
    low = high - 1
    while low >= rules.protect_first:
        good = False
        if rules.alike(low, high):
            tried: Measured = measure(low, high, tuple(runs), bound=bound)
            good = tried.value > threshold
            trials.append(tried.trial(tuple(runs), accepted=good))
        if good:
            growing = tried.run if low < high else None
            if growing and removed((*runs, growing)) == wanted:
                break
            low -= 1
        elif growing:
            runs.append(growing)
            growing, high = None, low
            # The released code now evaluates the window low..low, which changes nothing.
            low -= not rules.released
        else:
            high -= 1
            low -= 1
    if growing and not rules.released:
        runs.append(growing)
    return Found(tuple(runs), tuple(trials), threshold)


def walk_to_size(rules: WalkRules, wanted: int, measure: Measure, greatest: float) -> Found:
    """Find the highest threshold whose walk removes ``wanted`` layers.

    Args:
        rules: Rules of the walk.
        wanted: Number of layers to remove, from 1 to ``rules.most``; all of these are reachable.
        measure: As for `walk`.
        greatest: Upper bound of all values.
    """
    return highest_threshold(
        lambda threshold: walk(rules, threshold, measure, wanted), wanted, greatest
    )


def highest_threshold(walked: Callable[[float], Found], wanted: int, greatest: float) -> Found:
    """Find the highest threshold whose walk removes ``wanted`` layers, by bisection.

    A walk takes the same path for all thresholds from its greatest rejected value up to its
    least accepted one. Each walk therefore excludes an interval, and bisection needs few walks.

    Args:
        walked: Walks with a threshold and stops at ``wanted`` layers.
        wanted: Number of layers to remove; a walk without threshold reaches it.
        greatest: Upper bound of all values.
    """
    best = walked(-math.inf)
    low, high = _least_accepted(best), greatest
    tried = 1
    while low < high:
        made = walked((low + high) / 2)
        tried += 1
        if made.removed == wanted:
            best = made
            low = _least_accepted(made)
        else:
            high = max((t.similarity for t in made.trials if not t.accepted), default=low)
    # All thresholds from the greatest rejected to the least accepted value give this result.
    rejected = [trial.similarity for trial in best.trials if not trial.accepted]
    threshold = max(rejected, default=math.nextafter(_least_accepted(best), -math.inf))
    note = f"of {tried} walks tried, this one has the highest threshold that reaches the size"
    return Found(best.runs, best.trials, threshold, (note,))


def _least_accepted(made: Found) -> float:
    return min(trial.similarity for trial in made.trials if trial.accepted)
