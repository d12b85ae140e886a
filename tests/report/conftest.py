"""The sample run, and its page drawn once for all tests."""

from __future__ import annotations

import pytest

from slm_plugin.plans import PruningPlan
from slm_plugin.report.page import render_page
from slm_plugin.report.record import RunReport
from tests.report import sample_plans, samples


@pytest.fixture(scope="session")
def report() -> RunReport:
    """The sample run."""
    return samples.make_report()


@pytest.fixture(scope="session")
def plans() -> dict[str, PruningPlan]:
    """The plans of the sample run."""
    return sample_plans.plans()


@pytest.fixture(scope="session")
def page(report: RunReport, plans: dict[str, PruningPlan]) -> str:
    """The page of the sample run, with pictures."""
    pytest.importorskip("matplotlib")
    return render_page(report, plans)
