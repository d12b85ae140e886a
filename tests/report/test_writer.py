"""The files of a report."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from slm_plugin.plans import PruningPlan
from slm_plugin.report.record import RunReport
from slm_plugin.report.writer import to_json, write_report
from tests.report import samples


@pytest.mark.usefixtures("no_matplotlib")
def test_three_files_are_written(
    tmp_path: Path, report: RunReport, plans: dict[str, PruningPlan]
) -> None:
    """Record, page and card, and nothing else."""
    write_report(report, plans, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["README.md", "report.html", "report.json"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    assert (tmp_path / "README.md").read_text(encoding="utf-8").startswith("---\n")
    read = RunReport.model_validate_json((tmp_path / "report.json").read_text(encoding="utf-8"))
    assert read == report


def test_equal_reports_give_equal_bytes(report: RunReport) -> None:
    """The order in which versions were collected leaves no trace."""
    turned = report.model_copy(update={"versions": dict(reversed(report.versions.items()))})
    assert turned == report
    assert to_json(turned) == to_json(report)


def test_an_infinite_figure_is_still_json_and_reads_back() -> None:
    """A perplexity that overflowed does not make the record unreadable."""
    first, *rest = samples.make_report().states
    broken = first.measurements[0].model_copy(update={"value": math.inf})
    state = first.model_copy(update={"measurements": (broken,)})
    report = samples.make_report(states=(state, *rest))

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    json.loads(to_json(report), parse_constant=refuse)
    assert RunReport.model_validate_json(to_json(report)) == report
