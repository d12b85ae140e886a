"""The table that a run prints at its end."""

from __future__ import annotations

import io

from rich.table import Table
from rich.text import Text

from slm_plugin.control_characters import visible
from slm_plugin.progress import PlainConsole
from slm_plugin.report import before_after, numbers
from slm_plugin.report.record import RunReport

_STYLES = {"better": "green", "worse": "red"}


def as_text(table: Table) -> str:
    """A table as plain text."""
    console = PlainConsole(width=100, file=io.StringIO(), no_color=True)
    with console.capture() as captured:
        console.print(table)
    return captured.get()


def summary_table(report: RunReport) -> Table:
    """Sizes and measurements before and after, with ratios.

    A protocol is printed below its figure's name, truncated to one line; the page has it in full.
    """
    table = Table(title=Text(visible(report.title)), title_justify="left", caption_justify="left")
    table.caption = Text(visible(before_after.summary(report)))
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
            numbers.number(after - before, 0, signed=True),
            numbers.ratio(after / before),
        )
    table.add_section()
    for row in before_after.compare(report):
        if row.name != "parameters":
            table.add_row(*_cells(row))
    return table


def _cells(row: before_after.Comparison) -> list[Text]:
    sized = row.unit in numbers.BYTE_UNITS
    unit = f" ({row.unit})" if row.unit and not sized else ""
    name = Text(visible(f"{row.name}{unit}"), style="bold", no_wrap=True, overflow="ellipsis")
    name.append(f"\n{visible(row.protocol)}", style="not bold dim")

    def shown(value: float | None, *, signed: bool = False) -> str:
        if value is None:
            return "\N{EN DASH}"
        return numbers.quantity(value, row.unit if sized else "", row.decimals, signed=signed)

    before = row.before.value if row.before else None
    after = row.after.value if row.after else None
    ratio = "\N{EN DASH}" if row.ratio is None else numbers.ratio(row.ratio)
    style = _STYLES.get(row.verdict or "", "")
    return [
        name,
        Text(shown(before)),
        Text(shown(after)),
        Text(shown(row.difference, signed=True), style=style),
        Text(ratio, style=style),
    ]
