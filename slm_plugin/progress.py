"""Progress of long work, on standard error."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")
console = Console(stderr=True, highlight=False)


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yield the items and draw a bar with the time left while they are consumed.

    Off a terminal nothing is drawn: logs stay readable.
    """
    if not console.is_terminal:
        yield from items
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        yield from bar.track(items, total=total, description=label)


def say(message: str) -> None:
    """Print one line about what happens now."""
    console.print(message, markup=False)
