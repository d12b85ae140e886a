"""Progress of long work, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

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


@contextmanager
def counting(label: str) -> Iterator[Callable[[], None]]:
    """Give a function that counts one more step of work whose end is not known."""
    if not console.is_terminal:
        yield lambda: None
        return
    columns = (SpinnerColumn(), TextColumn("{task.description} {task.completed:.0f}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda: bar.advance(task)


def say(message: str) -> None:
    """Print one line about what happens now."""
    console.print(message, markup=False)
