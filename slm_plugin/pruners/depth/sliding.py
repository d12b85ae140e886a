"""The walk of Sliding Layer Merging, from the top of a decoder to its bottom, as pure decisions.

Source: SLM (arXiv 2502.19159), algorithm 1, in the exact form of the authors' released code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from slm_plugin.pruners.plan import Trial

Window = tuple[int, int]
Similarity = Callable[[int, int, tuple[Window, ...]], float]


@dataclass(frozen=True, slots=True)
class Rules:
    """What the walk may do.

    Attributes:
        layers: Decoder layers of the model.
        protect_first: Lowest layers that never take part.
        protect_last: Highest layers that never take part.
        flush_tail: Commit a window that is still growing when the walk reaches the bottom.
        trial_after_commit: Evaluate the one-layer window that a commit leaves behind.
    """

    layers: int
    protect_first: int
    protect_last: int
    flush_tail: bool
    trial_after_commit: bool

    @property
    def most(self) -> int:
        """Layers that can go at most: all but one of those that take part."""
        return max(0, self.layers - self.protect_first - self.protect_last - 1)


@dataclass(frozen=True, slots=True)
class Walk:
    """One walk: the trials in order and the windows that they led to, highest first."""

    threshold: float
    trials: tuple[Trial, ...]
    windows: tuple[Window, ...]

    @property
    def removed(self) -> int:
        """Layers that the windows take away."""
        return sum(last - first for first, last in self.windows)


def walk(rules: Rules, threshold: float, similarity: Similarity, wanted: int | None = None) -> Walk:
    """Slide a window down the decoder and merge what stays similar to the original model.

    Args:
        rules: What the walk may do.
        threshold: A merge is good when its similarity is greater.
        similarity: Similarity to the original model when layers first..last are merged on top of
            the windows that are merged already.
        wanted: Stop when that many layers are gone. Every good trial takes one more layer away,
            so the walk stops at exactly that size.
    """
    trials: list[Trial] = []
    windows: list[Window] = []
    high = rules.layers - 1 - rules.protect_last
    low = high - 1
    while low >= rules.protect_first:
        value = similarity(low, high, tuple(windows))
        good = value > threshold
        trials.append(
            Trial(first=low, last=high, committed=tuple(windows), similarity=value, accepted=good)
        )
        if good and Walk(threshold, (), (*windows, (low, high))).removed == wanted:
            return Walk(threshold, tuple(trials), (*windows, (low, high)))
        if good:
            low -= 1
        elif low + 1 < high:
            windows.append((low + 1, high))
            high = low
            # The released loop now evaluates the window low..low: the model as it is.
            low -= not rules.trial_after_commit
        else:
            high -= 1
            low -= 1
    if rules.flush_tail and low + 1 < high:
        windows.append((low + 1, high))
    return Walk(threshold, tuple(trials), tuple(windows))


def walk_to_size(rules: Rules, wanted: int, similarity: Similarity) -> tuple[Walk, int]:
    """Find the highest threshold whose walk takes ``wanted`` layers away, and stop there.

    A walk takes the same path for all thresholds from its greatest rejected similarity up to its
    least accepted one, so each walk rules out an interval, and bisection needs few of them.

    Args:
        rules: What the walk may do.
        wanted: Layers to take away, from 1 to ``rules.most``; all of these are reachable.
        similarity: As for `walk`.

    Returns:
        The walk, and the number of thresholds tried.
    """
    # Cosines lie in [-1, 1]; just below, everything merges, and at 1 nothing does.
    low, high = -1.0 - 1e-6, 1.0
    best = Walk(low, (), ())
    tried = 0
    while low < high:
        made = walk(rules, (low + high) / 2, similarity, wanted)
        tried += 1
        if made.removed == wanted:
            best = made
            low = min((t.similarity for t in made.trials if t.accepted), default=high)
        else:
            high = max((t.similarity for t in made.trials if not t.accepted), default=low)
    return best, tried
