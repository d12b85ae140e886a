"""Write what a run, an analysis or a comparison found into its output folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from slm_plugin.analysis.record import Analysis
from slm_plugin.comparison.record import ComparisonReport
from slm_plugin.files import write_text
from slm_plugin.pruners.plan import PruningPlan
from slm_plugin.report.analysis import render_analysis
from slm_plugin.report.card import render_card
from slm_plugin.report.page import render_page
from slm_plugin.report.record import RunReport
from slm_plugin.report.standings_page import markdown_table, render_comparison


def write_report(report: RunReport, plans: Mapping[str, PruningPlan], folder: Path) -> None:
    """Write ``report.json``, ``report.html`` and ``README.md``; each appears whole or not at all.

    Args:
        report: The run.
        plans: The plans of the run by file, as `StageRecord.plan` names them.
        folder: The run's output folder.

    Raises:
        OutputError: A file cannot be written.
    """
    write_text(folder / "report.json", to_json(report))
    write_text(folder / "report.html", render_page(report, plans))
    write_text(folder / "README.md", render_card(report, plans))


def write_analysis(analysis: Analysis, folder: Path) -> None:
    """Write ``analysis.json`` and ``analysis.html``; each appears whole or not at all.

    Raises:
        OutputError: A file cannot be written.
    """
    write_text(folder / "analysis.json", to_json(analysis))
    write_text(folder / "analysis.html", render_analysis(analysis))


def write_comparison(report: ComparisonReport, folder: Path) -> None:
    """Write ``comparison.json``, ``comparison.md`` and ``comparison.html``.

    Raises:
        OutputError: A file cannot be written.
    """
    write_text(folder / "comparison.json", to_json(report))
    write_text(folder / "comparison.md", markdown_table(report))
    write_text(folder / "comparison.html", render_comparison(report))


def to_json(record: BaseModel) -> str:
    """A record as JSON with sorted keys: equal records give equal bytes."""
    fields = _finite(record.model_dump(mode="json"))
    return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: object) -> object:
    """JSON has no infinity: a perplexity that overflowed becomes a string that reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
