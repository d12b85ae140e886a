"""Entry points of installed distributions, whatever one of them has in its metadata."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.metadata import Distribution, EntryPoint, distributions, entry_points

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
    try:
        return [*entry_points(group=group)]
    except Exception:
        return [p for points, _ in _each_distribution() for p in points if p.group == group]


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
