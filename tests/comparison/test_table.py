"""The table of a comparison: its columns, the best of a target, and the mean over tasks."""

from __future__ import annotations

import math

import pytest
from rich.console import Console

from slm_plugin.comparison.table import MEAN, Column, Row, best, columns, comparison_table, rows
from slm_plugin.report.table import terminal
from tests.comparison.sample import ROWS, make_comparison


def by_name() -> dict[str, Column]:
    """The columns of the sample."""
    return {column.name: column for column in columns(make_comparison())}


def test_every_figure_is_a_column_with_a_value_a_row() -> None:
    """Sizes, figures with their unit, the mean, and what the method took; a failed row is empty."""
    found = by_name()
    assert list(found) == [
        "layers removed", "parameters", "perplexity text 128", MEAN, "piqa acc", "piqa acc_norm",
        "winogrande acc", "decode speed (tokens/s)", "time of the method", "memory of the method",
    ]  # fmt: skip
    assert found["layers removed"].values == (0, 3, 3, 6, 6, None)
    assert found["perplexity text 128"].values == (*(row[2] for row in ROWS), None)
    assert found["time of the method"].values == (None, 30.0, 60.0, 45.0, 90.0, None)
    assert found["perplexity text 128"].shown(5) == "\N{EN DASH}"
    assert found["decode speed (tokens/s)"].shown(1) == "22.00 ±0.50"
    assert found["piqa acc"].shown(1) == "0.6500 ±0.0300"


def test_the_mean_takes_one_score_a_task() -> None:
    """acc_norm where there is one, else acc; errors as of independent tasks."""
    mean = by_name()[MEAN]
    assert mean.values[0] == pytest.approx((0.71 + 0.50) / 2)
    assert mean.stderrs[0] == pytest.approx(math.sqrt(0.03**2 + 0.04**2) / 2)
    assert mean.values[5] is None


def test_the_best_of_every_target_is_marked() -> None:
    """In the column's direction; neither the dense model nor a column without a choice."""
    listed, found = rows(make_comparison()), by_name()
    assert best(found["perplexity text 128"], listed) == {2, 3}
    assert best(found["decode speed (tokens/s)"], listed) == {1, 3}
    assert best(found["time of the method"], listed) == {1, 3}
    assert best(found["winogrande acc"], listed) == {1, 3}
    assert best(found["piqa acc"], listed) == {2}
    assert best(found["parameters"], listed) == best(found["layers removed"], listed) == set()


def test_what_most_rows_share_is_no_distinction() -> None:
    """One operator's parameters more than all others: the others are not the best of anything."""
    listed = [Row("dense", "", "", "", 0), *(Row(name, "", "", "", 1) for name in "abcd")]
    for values, marked in (
        ((9.0, 3.0, 3.0, 3.0, 4.0), set()),
        ((9.0, 3.0, 3.0, 4.0, 4.0), {1, 2}),
        ((9.0, 3.0, None, math.nan, 4.0), {1}),
        ((9.0, 3.0, 3.0, None, 4.0), set()),
        ((9.0, None, None, None, None), set()),
    ):
        assert best(Column("parameters", "", "lower", values, str), listed) == marked


def test_the_terminal_has_every_row() -> None:
    """With the reason of the one that failed."""
    table = terminal(comparison_table(make_comparison(), brief=True))
    assert table.row_count == 6
    names = [str(cell) for cell in table.columns[0].cells]
    assert names[0] == "dense"
    assert names[-1] == "angular\nthe score of layer 3 is <NaN>"


@pytest.mark.parametrize("width", [60, 80, 140])
def test_the_terminal_cuts_nothing(width: int) -> None:
    """The mean stands for its tasks, what does not fit is folded, and every row has its end."""
    table = terminal(comparison_table(make_comparison(), brief=True))
    headings = [str(column.header) for column in table.columns]
    assert MEAN in headings and not any("piqa" in heading for heading in headings)
    console = Console(width=width)
    with console.capture() as captured:
        console.print(table)
    _, *lines = captured.get().splitlines()
    assert max(map(len, lines)) <= width
    assert {line[-1] for line in lines} == set("┓┃┩│┤┘")
    assert "\N{HORIZONTAL ELLIPSIS}" not in captured.get()


def test_figures_of_different_protocols_are_different_columns() -> None:
    """One name by two protocols: a row has its value in one column and none in the other."""
    report = make_comparison()
    (figure,) = report.cells[1].measured["perplexity"]
    other = figure.model_copy(update={"protocol": "pieces of 2048 tokens"})
    changed = report.cells[1].model_copy(
        update={"measured": {**report.cells[1].measured, "perplexity": (other,)}}
    )
    cells = (report.cells[0], changed, *report.cells[2:])
    found = {
        column.protocol: column.values
        for column in columns(report.model_copy(update={"cells": cells}))
        if column.name == figure.name
    }
    assert set(found) == {figure.protocol, other.protocol}
    assert found[other.protocol] == (None, figure.value, None, None, None, None)
    assert found[figure.protocol] == (ROWS[0][2], None, *(row[2] for row in ROWS[2:]), None)
