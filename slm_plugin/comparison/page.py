"""A comparison as one self-contained page whose table can be sorted, and as Markdown."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

import yaml
from markupsafe import Markup

from slm_plugin.comparison.plot import OUTLIER, pareto_plot
from slm_plugin.comparison.record import ComparisonReport
from slm_plugin.comparison.table import (
    MEAN,
    PARAMETERS,
    Column,
    Row,
    columns,
    comparison_table,
    rows,
)
from slm_plugin.files import write_text
from slm_plugin.report import numbers
from slm_plugin.report.environment import environment
from slm_plugin.report.markdown import escape
from slm_plugin.report.page import Picture, picture
from slm_plugin.report.table import markdown
from slm_plugin.report.writer import to_json


def render_comparison(report: ComparisonReport) -> str:
    """A comparison as an HTML page.

    The only script sorts the table. The page's content security policy allows it by its hash.
    Without it the table is in the order of the targets.

    Returns:
        HTML. Where matplotlib is missing, the page has a notice in place of every plot.
    """
    script = (files("slm_plugin.report") / "templates" / "sort.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    shown = columns(report)
    template = environment().get_template("comparison.html.j2")
    return template.render(
        report=report,
        table=comparison_table(report),
        columns=shown,
        summary=summary(report),
        pictures=pareto_pictures(rows(report), shown),
        script=Markup(script),
        script_hash=Markup(f"sha256-{digest}"),
        file=yaml.safe_dump(
            report.model_dump(mode="json", include={"comparison"})["comparison"],
            sort_keys=False,
            allow_unicode=True,
        ),
    )


def summary(report: ComparisonReport) -> str:
    """The comparison in one sentence."""
    pruned = report.cells[1:]
    failed = sum(bool(cell.error) for cell in pruned)
    methods = numbers.plural(len({cell.label for cell in pruned}), "method")
    targets = numbers.plural(len({cell.target for cell in pruned}), "target")
    said = f"{methods} at {targets} on {report.model}, {numbers.plural(len(pruned), 'row')}"
    return f"{said}, {failed} of them failed." if failed else f"{said}."


def pareto_pictures(listed: Sequence[Row], shown: Sequence[Column]) -> list[Picture]:
    """Plots of every quality measure against parameters, and against decode speed if measured."""
    size = next(column for column in shown if column.name == PARAMETERS)
    speed = [column for column in shown if column.name.startswith("decode speed")]
    drawn = []
    for number, judge in enumerate(quality_columns(shown), start=1):
        for other, across in enumerate((size, *speed), start=1):
            name = f"front-{number}-{other}"
            title = f"{judge.name} against {across.name}"
            made = picture(title, _caption(judge), pareto_plot, listed, across, judge, name)
            drawn += [made] if made is not None else []
    return drawn


def _caption(judge: Column) -> str:
    said = (
        "Every point is a row of the table. The line is the Pareto front: no other model is as "
        "good in both and better in one."
    )
    if judge.better == "lower":
        said += f" Models of more than {OUTLIER:.0f} times the lowest {judge.name} are left out."
    return said


def quality_columns(shown: Sequence[Column]) -> list[Column]:
    """The columns that measure quality; of several tasks only the mean."""
    mean = any(column.name == MEAN for column in shown)
    return [
        column
        for column in shown
        if column.quality and (column.better == "lower" or not mean or column.name == MEAN)
    ]


def markdown_table(report: ComparisonReport) -> str:
    """A comparison as a Markdown file: the table and the measurement protocols."""
    lines = [
        f"# {escape(report.title)}",
        "",
        escape(summary(report)),
        "Bold is the best of a target.",
        "",
        markdown(comparison_table(report)),
        "",
    ]
    shown = columns(report)
    lines += [f"- {escape(c.name)}: {escape(c.protocol)}" for c in shown if c.protocol]
    if report.calibration is not None:
        drawn = report.calibration
        lines.append(
            f"- calibration: {escape(drawn.source)}, {drawn.samples} samples of {drawn.length} "
            f"tokens, seed {drawn.seed}"
        )
    return "\n".join(lines) + "\n"


def write_comparison(report: ComparisonReport, folder: Path) -> None:
    """Write ``comparison.json``, ``comparison.md`` and ``comparison.html``.

    Raises:
        OutputError: A file cannot be written.
    """
    write_text(folder / "comparison.json", to_json(report))
    write_text(folder / "comparison.md", markdown_table(report))
    write_text(folder / "comparison.html", render_comparison(report))
