"""Write the report files of a run into its output folder."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel

from slm_plugin.files import write_text
from slm_plugin.plans import PruningPlan
from slm_plugin.report.card import render_card
from slm_plugin.report.page import render_page
from slm_plugin.report.record import RunReport


def write_report(report: RunReport, plans: Mapping[str, PruningPlan], folder: Path) -> None:
    """Write ``report.json``, ``report.html`` and ``README.md``; each atomically.

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


def to_json(record: BaseModel) -> str:
    """A record as JSON with sorted keys: equal records give equal bytes."""
    fields = _finite(record.model_dump(mode="json"))
    return json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: object) -> object:
    """Replace infinities, which JSON lacks, by strings that pydantic reads back."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return value
