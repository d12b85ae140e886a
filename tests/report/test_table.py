"""The table model in its three renderings, and the table at the end of a run."""

from __future__ import annotations

import io

from markdown_it import MarkdownIt
from rich.console import Console

from slm_plugin.report.before_after import summary_table
from slm_plugin.report.environment import environment
from slm_plugin.report.record import RunReport
from slm_plugin.report.table import Cell, Column, Row, Table, as_text, markdown, terminal
from tests.report import samples
from tests.report.test_page import read


def printed(report: RunReport, width: int = 140) -> str:
    """The table as a terminal of some width shows it."""
    out = io.StringIO()
    Console(width=width, file=out).print(terminal(summary_table(report), wrap=False))
    return samples.typed(out.getvalue())


def test_the_table_compares_sizes_and_figures(report: RunReport) -> None:
    """Layers, parameters and every figure stand with before, after, difference and ratio."""
    lines = {line.strip("│ ").split("│")[0].strip(): line for line in printed(report).splitlines()}
    cells = {name: [c.strip() for c in line.split("│")[2:6]] for name, line in lines.items()}
    assert cells["layers"] == ["30", "27", "-3", "x0.900"]
    assert cells["parameters"] == ["134,515,008", "107,720,640", "-26,794,368", "x0.801"]
    assert cells["perplexity wikitext2 2048"] == ["33.91", "61.72", "+27.81", "x1.820"]
    assert cells["prefill time (ms)"] == ["61.42", "53.55", "-7.87", "x0.872"]
    assert cells["weights"] == ["538.1 MB", "430.9 MB", "-107.2 MB", "x0.801"]


def test_the_table_fits_a_narrow_terminal(report: RunReport) -> None:
    """At 80 columns every figure takes two lines, its name and its protocol; no number is cut."""
    text = printed(report, 80)
    inside = [
        line for line in text.splitlines() if line.startswith("\N{BOX DRAWINGS LIGHT VERTICAL}")
    ]
    assert len(inside) == 2 + 2 * len(report.states[0].measurements)
    assert all(len(line) <= 80 for line in text.splitlines())
    assert "-26,794,368" in text and "x1.820" in text


def test_markup_in_names_is_text() -> None:
    """Square brackets of a title or a name reach the terminal as they are."""
    report, _ = samples.nasty("[red]x[/red] [/nope]")
    assert "[red]x[/red] [/nope]" in printed(report)


def test_a_run_without_an_after_has_dashes() -> None:
    """A run that only measured shows what it has."""
    report = samples.make_report(states=samples.make_report().states[:1])
    line = next(line for line in printed(report).splitlines() if "perplexity" in line)
    assert [c.strip() for c in line.split("│")[2:6]] == ["33.91", "-", "-", "-"]


def test_a_size_that_was_measured_too_stands_once() -> None:
    """The footprint's parameter count would repeat a line of the table."""
    report = samples.make_report()
    states = []
    for state in report.states:
        counted = state.measurements[0].model_copy(update={"name": "parameters", "value": 9.0})
        states.append(state.model_copy(update={"measurements": (*state.measurements, counted)}))
    text = printed(report.model_copy(update={"states": tuple(states)}))
    lines = [line for line in text.splitlines() if line[2:].startswith("parameters  ")]
    assert len(lines) == 1 and "134,515,008" in lines[0]


def sample(text: str) -> Table:
    """Two rows; every string of the table holds the text."""
    return Table(
        (Column(f"name {text}", words=True), Column(f"figure {text}", better="lower")),
        (
            Row((Cell(f"one {text}"), Cell("1", "best")), note=f"note {text}"),
            Row((Cell(text, "code"), Cell(f"2 {text}", "worse", value=f'"{text}')), section=True),
        ),
        title=f"title {text}",
        caption=f"caption {text}",
    )


NASTY = '<b>|`*x*`| [red]y[/red] & "q"'


def test_a_page_shows_the_strings_of_a_table_as_they_are() -> None:
    """The same tags whatever the strings hold, sorted or not; notes span a row of their own."""
    template = environment().from_string(
        '{% from "parts.html.j2" import grid %}{{ grid(t, name) }}'
    )
    for name in ("", "sorted"):
        harmless, found = (read(template.render(t=sample(s), name=name)) for s in ("x", NASTY))
        assert found.tags == harmless.tags and found.tags.count("tr") == 4
        assert [n for n, _ in found.attributes] == [n for n, _ in harmless.attributes]
        for said in ("name", "figure", "one", "note", "2"):
            assert f"{said} {NASTY}" in found.text
        assert ("data-value", f'"{NASTY}') in found.attributes or not name
        assert ("colspan", "2") in found.attributes


def test_markdown_keeps_every_string_in_its_cell() -> None:
    """The best in bold, code as code, and notes numbered below the table."""
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")
    tokens = parser.parse(markdown(sample(NASTY)))
    cells = [tokens[i + 1].children or [] for i, t in enumerate(tokens) if t.type[1:] == "d_open"]
    assert [[child.content for child in cell if child.content] for cell in cells] == [
        [f"one {NASTY}"],
        ["1"],
        ["1"],
        [NASTY],
        [],
        [f"2 {NASTY}"],
    ]
    assert "strong_open" in [child.type for child in cells[2]]
    assert cells[3][0].type == "code_inline"
    assert not any(t.type.startswith("html") for t in tokens)
    (note,) = (
        t.children or [] for i, t in enumerate(tokens) if tokens[i - 2].type == "list_item_open"
    )
    assert note[0].content == f"note {NASTY}"


def test_a_terminal_shows_every_string() -> None:
    """Title, caption, notes and cells, each as it is."""
    shown = " ".join(as_text(terminal(sample(NASTY))).split())
    for said in ("title", "name", "figure", "one", "note", "2", "caption"):
        assert f"{said} {NASTY}" in shown
