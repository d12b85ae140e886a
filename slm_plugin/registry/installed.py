"""Entry points of installed distributions, whatever one of them has in its metadata."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import lru_cache
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points
from pathlib import Path

from slm_plugin.foreign import reason


def broken_metadata() -> list[str]:
    """Distributions whose entry points cannot be read, a line each."""
    try:
        entry_points()
    except Exception:
        return [said for _, said in _each_distribution() if said]
    return []


def points(group: str) -> list[EntryPoint]:
    """Entry points of a group; a distribution whose metadata are damaged offers none."""
    return [*_points(group, tuple(_places()))]


def _places() -> Iterator[tuple[str, int]]:
    """Where distributions are looked for, and when something was last installed there."""
    for place in sys.path:
        try:
            yield place, Path(place).stat().st_mtime_ns
        except OSError:
            yield place, 0


# Every recipe asks several times, and reading the metadata of all distributions takes 10 ms.
@lru_cache(maxsize=16)
def _points(group: str, places: tuple[tuple[str, int], ...]) -> tuple[EntryPoint, ...]:
    try:
        return tuple(entry_points(group=group))
    except Exception:
        return tuple(p for points, _ in _each_distribution() for p in points if p.group == group)


def _each_distribution() -> Iterator[tuple[list[EntryPoint], str]]:
    """Entry points of every distribution, or one line that says why it has none."""
    for distribution in distributions():
        try:
            yield [*distribution.entry_points], ""
        except Exception as error:
            yield [], f"the entry points of {_named(distribution)} cannot be read: {reason(error)}"


def _named(distribution: Distribution) -> str:
    try:
        return str(distribution.metadata["Name"])
    except Exception:
        return "a distribution"


def distribution_of(point: EntryPoint) -> str:
    """Name and version of who offers it, or the module where nobody says."""
    try:
        assert point.dist is not None
        return f"{point.dist.metadata['Name']} {point.dist.version}"
    except Exception:
        return point.value
