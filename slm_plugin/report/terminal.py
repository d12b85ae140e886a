"""The one table that a run, or a comparison, prints at its end."""

from __future__ import annotations

import io

from rich.table import Table
from rich.text import Text

from slm_plugin.comparison.record import ComparisonReport
from slm_plugin.control_characters import visible
from slm_plugin.progress import PlainConsole
from slm_plugin.report import comparison, quantities
from slm_plugin.report.record import RunReport
from slm_plugin.report.standings import best, columns, rows

_STYLES = {"better": "green", "worse": "red"}


def as_text(table: Table) -> str:
    """A table as plain text."""
    console = PlainConsole(width=100, file=io.StringIO(), no_color=True)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def summary_table(report: RunReport) -> Table:
    """Sizes and measurements before and after, with ratios.

    A protocol stands under its figure's name, cut where the line ends: the page has it whole.
    """
    table = Table(title=Text(visible(report.title)), title_justify="left", caption_justify="left")
    table.caption = Text(visible(comparison.summary(report)))
    table.add_column("")
    for heading in ("before", "after", "difference", "ratio"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, before, after in (
        ("layers", report.before.layers, report.after.layers),
        ("parameters", report.before.parameters, report.after.parameters),
    ):
        table.add_row(
            Text(name),
            f"{before:,}",
            f"{after:,}",
            quantities.number(after - before, 0, signed=True),
            quantities.ratio(after / before),
        )
    table.add_section()
    for row in comparison.compare(report):
        if row.name != "parameters":
            table.add_row(*_cells(row))
    return table


def _cells(row: comparison.Comparison) -> list[Text]:
    sized = row.unit in quantities.BYTE_UNITS
    unit = f" ({row.unit})" if row.unit and not sized else ""
    name = Text(visible(f"{row.name}{unit}"), style="bold", no_wrap=True, overflow="ellipsis")
    name.append(f"\n{visible(row.protocol)}", style="not bold dim")

    def shown(value: float | None, *, signed: bool = False) -> str:
        if value is None:
            return "\N{EN DASH}"
        return quantities.quantity(value, row.unit if sized else "", row.decimals, signed=signed)

    before = row.before.value if row.before else None
    after = row.after.value if row.after else None
    ratio = "\N{EN DASH}" if row.ratio is None else quantities.ratio(row.ratio)
    style = _STYLES.get(row.verdict or "", "")
    return [
        name,
        Text(shown(before)),
        Text(shown(after)),
        Text(shown(row.difference, signed=True), style=style),
        Text(ratio, style=style),
    ]


def comparison_table(report: ComparisonReport) -> Table:
    """A comparison: a row a cell, the best of every target in green, what failed below it.

    Details are left to the files; what is too long for its column goes on below.
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
