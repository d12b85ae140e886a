"""Exchanges on a set of dropped layers: some of them come back, and as many others go.

Source: the move is the mutation of EvoPress (arXiv 2410.14649). Here it serves a local search from
a finished plan, which accepts an exchange only where it is strictly better.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple

from slm_plugin.plans import Trial
from slm_plugin.pruners.depth.search.runs import DROP, Measured, Run

# Most layers that one exchange brings back.
MOST = 3
# Draws of sets tried before, in a row, after which there seem to be no others.
REPEATED = 1000
# Dropped layers, ascending.
Dropped = tuple[int, ...]


class Tried(NamedTuple):
    """A set of dropped layers with its value.

    Attributes:
        dropped: The set.
        layer: The lowest layer that the set it came from keeps; of a start the lowest of all.
        value: The mean of the criterion over the evaluated samples; greater is better.
        samples: Number of evaluated samples after early stopping; None if all were.
    """

    dropped: Dropped
    layer: int
    value: float
    samples: int | None = None

    def trial(self, *, accepted: bool) -> Trial:
        """The record in a plan: one layer dropped on top of the others."""
        rest = tuple(Run(index, index, DROP) for index in self.dropped if index != self.layer)
        run = Run(self.layer, self.layer, DROP)
        return Measured(run, self.value, self.samples).trial(rest, accepted=accepted)


# The value of a set of dropped layers. It may stop once the set is clearly worse than another.
Judge = Callable[[Dropped, Tried | None], Tried]


def exchanged(
    dropped: Sequence[int], kept: Sequence[int], generator: random.Random
) -> tuple[int, ...]:
    """A set with one to `MOST` layers exchanged, the smaller of two uniform draws.

    Args:
        dropped: Dropped layers, at least one.
        kept: Other layers that may be dropped, at least one.
        generator: Decides.
    """
    most = min(MOST, len(dropped), len(kept))
    count = min(generator.randint(1, most), generator.randint(1, most))
    back = generator.sample(dropped, count)
    return tuple(sorted({*dropped}.difference(back).union(generator.sample(kept, count))))


def polished(
    start: Dropped, eligible: Collection[int], tries: int, seed: int, judge: Judge
) -> tuple[list[Tried], list[Tried]]:
    """Try exchanges on a set of dropped layers, and keep each that is strictly better.

    No set is tried twice, and the search ends early where it finds none that is new.

    Args:
        start: Dropped layers, all of them eligible.
        eligible: Layers that may be dropped.
        tries: Most sets to try beside the start.
        seed: Decides the exchanges.
        judge: Gives the value of a set, which may stop at the best one so far.

    Returns:
        The start and what replaced it, in order, and all other sets that were tried.
    """
    generator = random.Random(seed)
    best, others = [judge(start, None)], list[Tried]()
    seen, repeated = {start}, 0
    while len(seen) <= tries and repeated < REPEATED:
        present = best[-1].dropped
        kept = [index for index in sorted(eligible) if index not in present]
        if not kept:
            break
        new = exchanged(present, kept, generator)
        if new in seen:
            repeated += 1
            continue
        seen.add(new)
        repeated = 0
        tried = judge(new, best[-1])
        better = tried.samples is None and tried.value > best[-1].value
        (best if better else others).append(tried)
    return best, others
