"""Progress of long work, on standard error, and the one way in which anything is printed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.segment import Segment

from slm_plugin.control_characters import visible

T = TypeVar("T")


class PlainConsole(Console):
    """A console on which text means only itself: no markup, no emoji codes, no control characters.

    Styles and cursor movements of our own tables and bars are segments apart from the text. A
    notebook is no terminal: it gets lines of text, not an HTML element for each, and no bars.
    """

    def __init__(self, **settings: Any) -> None:
        if Console().is_jupyter:
            settings = {"force_jupyter": False, "force_terminal": False, **settings}
        super().__init__(markup=False, emoji=False, highlight=False, **settings)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterator[Segment]:
        """Render with everything that a terminal would obey written out."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text, keep="\n"), style, control)


console = PlainConsole(stderr=True)
_bars: list[Progress] = []


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Yield the items and draw a bar with the time left while they are consumed.

    Off a terminal nothing is drawn: logs stay readable.
    """
    if not console.is_terminal:
        yield from items
        return
    columns = (_description(), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with _bar(*columns) as bar:
        yield from bar.track(items, total=total, description=visible(label))


@contextmanager
def counting(label: str) -> Iterator[Callable[[], None]]:
    """Give a function that counts one more step of work whose end is not known."""
    if not console.is_terminal:
        yield lambda: None
        return
    description = _description("{task.description} {task.completed:.0f}")
    with _bar(SpinnerColumn(), description, TimeElapsedColumn()) as bar:
        task = bar.add_task(visible(label), total=None)
        yield lambda: bar.advance(task)


def say(message: str) -> None:
    """Print one line about what happens now."""
    console.print(visible(message), soft_wrap=True)


@contextmanager
def timed(label: str) -> Iterator[None]:
    """Say what begins, and how long it took when it is done."""
    started = time.perf_counter()
    say(f"{label} …")
    yield
    say(f"  {time.perf_counter() - started:.1f} s")


def complain(message: str, hint: str = "") -> None:
    """Print an error, a line for each of the message's, and what to do about it."""
    lines = [line for line in message.split("\n") if line.strip()]
    for line in lines or ["it gives no reason"]:
        console.print(f"error: {visible(line)}", style="red", soft_wrap=True)
    for line in hint.split("\n") if hint.strip() else ():
        console.print(f"hint: {visible(line)}", soft_wrap=True)


def finish_bars() -> None:
    """Take down bars whose work has failed: what failed may hold on to them."""
    while _bars:
        _bars.pop().stop()


@contextmanager
def _bar(*columns: ProgressColumn) -> Iterator[Progress]:
    with Progress(*columns, console=console, transient=True) as bar:
        _bars.append(bar)
        try:
            yield bar
        finally:
            if bar in _bars:
                _bars.remove(bar)


def _description(pattern: str = "{task.description}") -> TextColumn:
    return TextColumn(pattern, markup=False)
