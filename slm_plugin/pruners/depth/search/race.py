"""Judge candidates on the calibration set, and stop those that are clearly worse than the best."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import fmean, stdev

# Fewest samples after which a candidate may stop.
FEWEST = 8
# Standard errors by which a candidate must be worse: one-sided, 99.9 % for normal differences.
DEVIATIONS = 3.09


def race(
    candidates: int, parts: int, values: Callable[[int, int], Sequence[float]], *, whole: bool
) -> list[list[float]]:
    """Values of candidates on the samples, part by part.

    Args:
        candidates: Number of candidates.
        parts: Number of parts of the samples that count.
        values: The values of a candidate on the samples of a part; greater is better.
        whole: Judge all candidates on all of them. Otherwise one stops as soon as the mean of the
            differences to the best one so far, sample by sample, is `DEVIATIONS` standard errors
            below 0. The test is repeated after every part without a correction for that.

    Returns:
        For every candidate the values of its samples; fewer where it stopped.
    """
    seen: list[list[float]] = [[] for _ in range(candidates)]
    running = list(range(candidates))
    for part in range(parts):
        for candidate in running:
            seen[candidate] += values(candidate, part)
        if not whole and len(running) > 1 and part + 1 < parts:
            best = max(running, key=lambda candidate: fmean(seen[candidate]))
            running = [c for c in running if not is_worse(seen[c], seen[best])]
    return seen


def is_worse(values: Sequence[float], best: Sequence[float]) -> bool:
    """Whether one candidate's values are clearly below another's on the same samples."""
    differences = [one - other for one, other in zip(values, best, strict=True)]
    if len(differences) < FEWEST:
        return False
    return fmean(differences) < -DEVIATIONS * stdev(differences) / math.sqrt(len(differences))
