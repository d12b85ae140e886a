"""The walk of Sliding Layer Merging, from the top of a decoder to its bottom, as pure decisions.

Source: SLM (arXiv 2502.19159), algorithm 1, in the exact form of the authors' released code.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from slm_plugin.plans import Trial
from slm_plugin.pruners.depth.search.runs import Found, Measure, Measured, Rules, Run, removed


@dataclass(frozen=True, slots=True)
class WalkRules(Rules):
    """What the walk may do.

    Attributes:
        flush_tail: Commit a window that is still growing when the walk reaches the bottom.
        trial_after_commit: Evaluate the one-layer window that a commit leaves behind.
        early_rejection: Stop a trial when the samples seen decide that it fails.
    """

    flush_tail: bool = True
    trial_after_commit: bool = False
    early_rejection: bool = True


def walk(rules: WalkRules, threshold: float, measure: Measure, wanted: int | None = None) -> Found:
    """Slide a window down the decoder and merge what stays similar to the original model.

    Args:
        rules: What the walk may do.
        threshold: A merge is good when its value is greater.
        measure: Compares the model with a run merged, on top of those merged already, with the
            original one.
        wanted: Stop when that many layers are gone. Every good trial takes one more layer away,
            so the walk stops at exactly that size.
    """
    trials: list[Trial] = []
    runs: list[Run] = []
    growing: Run | None = None
    # A walk to a size is one of many: which interval of thresholds it stands for, its exact
    # values tell.
    hopeless_at = threshold if rules.early_rejection and wanted is None else None
    high = rules.top
    low = high - 1
    while low >= rules.protect_first:
        tried: Measured = measure(low, high, tuple(runs), hopeless_at=hopeless_at)
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
            # The released loop now evaluates the window low..low: the model as it is.
            low -= not rules.trial_after_commit
        else:
            high -= 1
            low -= 1
    if growing and (rules.flush_tail or removed((*runs, growing)) == wanted):
        runs.append(growing)
    return Found(tuple(runs), tuple(trials), threshold)


def walk_to_size(rules: WalkRules, wanted: int, measure: Measure, greatest: float) -> Found:
    """Find the highest threshold whose walk takes ``wanted`` layers away, and stop there.

    Args:
        rules: What the walk may do.
        wanted: Layers to take away, from 1 to ``rules.most``; all of these are reachable.
        measure: As for `walk`.
        greatest: No value is greater.
    """
    return highest_threshold(
        lambda threshold: walk(rules, threshold, measure, wanted), wanted, greatest
    )


def highest_threshold(walked: Callable[[float], Found], wanted: int, greatest: float) -> Found:
    """Find the highest threshold whose walk takes ``wanted`` layers away.

    A walk takes the same path for all thresholds from its greatest rejected value up to its
    least accepted one, so each walk rules out an interval, and bisection needs few of them.

    Args:
        walked: Walks with a threshold, up to ``wanted`` layers and no further.
        wanted: Layers to take away; without any threshold the walk takes them.
        greatest: No value is greater.
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
    # All thresholds from the greatest rejected value up to the least accepted one decide alike.
    rejected = [trial.similarity for trial in best.trials if not trial.accepted]
    threshold = max(rejected, default=math.nextafter(_least_accepted(best), -math.inf))
    note = f"of {tried} walks tried, this one has the highest threshold that reaches the size"
    return Found(best.runs, best.trials, threshold, (note,))


def _least_accepted(made: Found) -> float:
    return min(trial.similarity for trial in made.trials if trial.accepted)
