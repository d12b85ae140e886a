"""The table that a comparison prints at its end."""

from __future__ import annotations

from rich.table import Table
from rich.text import Text

from slm_plugin.comparison.record import ComparisonReport
from slm_plugin.comparison.table import best, columns, rows
from slm_plugin.control_characters import visible


def comparison_table(report: ComparisonReport) -> Table:
    """The comparison table, with the best values of every target in green and errors in red.

    Detail columns are left out; long text wraps in its column.
    """
    listed, shown = rows(report), [column for column in columns(report) if not column.detail]
    winners = [best(column, listed) for column in shown]
    table = Table(title=Text(visible(report.title)), title_justify="left", caption_justify="left")
    table.add_column("method", overflow="fold")
    for column in shown:
        table.add_column(Text(visible(column.name)), justify="right", overflow="fold")
    for index, row in enumerate(listed):
        if index and row.group != listed[index - 1].group:
            table.add_section()
        name = Text(visible(row.name), style="bold" if not row.group else "")
        if report.cells[index].error:
            name.append(f"\n{visible(report.cells[index].error)}", style="not bold red")
        figures = [
            Text(column.shown(index), style="green" if index in won else "")
            for column, won in zip(shown, winners, strict=True)
        ]
        table.add_row(name, *figures)
    return table
