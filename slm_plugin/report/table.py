"""One table model for the terminal, HTML pages (`parts.html.j2`) and Markdown."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_plugin.control_characters import visible
from slm_plugin.report.markdown import Markdown, code, escape

if TYPE_CHECKING:
    import rich.table

DASH = "\N{EN DASH}"
_COLOURS = {"best": "green", "better": "green", "worse": "red"}


@dataclass(frozen=True, slots=True)
class Cell:
    """One cell.

    Attributes:
        text: What is shown.
        style: ``best``, ``better``, ``worse``, ``muted``, ``code`` or nothing.
        value: By what a table in a page sorts the cell, where that is not its text.
    """

    text: str
    style: str = ""
    value: str | None = None


@dataclass(frozen=True, slots=True)
class Column:
    """A heading; numbers are aligned to the right, and the better direction is sorted first."""

    heading: str
    words: bool = False
    better: str = ""


@dataclass(frozen=True, slots=True)
class Row:
    """The cells of a row, and a note for all of it, as the protocol of its figures."""

    cells: tuple[Cell, ...]
    note: str = ""
    section: bool = False


@dataclass(frozen=True, slots=True)
class Table:
    """A table; the first column names the rows."""

    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    title: str = ""
    caption: str = ""


def terminal(table: Table, *, wrap: bool = True) -> rich.table.Table:
    """The table for a rich console, with every note below the name of its row.

    Args:
        table: The table.
        wrap: Wrap long cells, rather than cut names and notes and keep figures whole.
    """
    from rich.table import Table as RichTable
    from rich.text import Text

    def text(content: str, style: str = "") -> Text:
        return Text(
            visible(content),
            style=style,
            no_wrap=not wrap,
            overflow="fold" if wrap else "ellipsis",
        )

    made = RichTable(title=text(table.title), title_justify="left", caption_justify="left")
    made.caption = Text(visible(table.caption)) if table.caption else None
    for column in table.columns:
        made.add_column(
            text(column.heading),
            justify="left" if column.words else "right",
            overflow="fold",
            no_wrap=not wrap and not column.words,
        )
    for row in table.rows:
        if row.section:
            made.add_section()
        cells = [text(cell.text, _COLOURS.get(cell.style, "")) for cell in row.cells]
        if row.note:
            cells[0].append(f"\n{visible(row.note)}", style="dim")
        made.add_row(*cells)
    return made


def as_text(table: rich.table.Table) -> str:
    """A table for a console as plain text."""
    from slm_plugin.progress import PlainConsole

    console = PlainConsole(width=100, file=io.StringIO(), color_system=None)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def markdown(table: Table) -> Markdown:
    """The table in Markdown, with the best in bold; notes are numbered and listed below."""
    notes = list(dict.fromkeys(row.note for row in table.rows if row.note))
    head = [(escape(column.heading), "---" if column.words else "---:") for column in table.columns]
    rows = [[_marked(cell) for cell in row.cells] for row in table.rows]
    if notes:
        head.insert(1, ("note", "---:"))
        for cells, row in zip(rows, table.rows, strict=True):
            cells.insert(1, str(notes.index(row.note) + 1) if row.note else "")
    lines = [[one[0] for one in head], [one[1] for one in head], *rows]
    text = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    listed = "".join(f"\n{n}. {escape(note)}" for n, note in enumerate(notes, start=1))
    return Markdown(f"{text}\n{listed}".rstrip())


def _marked(cell: Cell) -> str:
    if cell.style == "code":
        return code(cell.text)
    return f"**{escape(cell.text)}**" if cell.style == "best" else escape(cell.text)
