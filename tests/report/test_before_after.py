"""What changed between the states of a run."""

from __future__ import annotations

import math
from typing import Literal

import pytest

from slm_plugin.evaluation.base import Measurement
from slm_plugin.report import before_after
from slm_plugin.report.record import RunReport, StateRecord
from tests.report import sample_plans, samples
from tests.report.samples import typed


def state(stage: int, *measurements: Measurement) -> StateRecord:
    """A state with a label of its own."""
    return StateRecord(stage=stage, label=f"state {stage}", measurements=measurements)


def figure(
    value: float,
    *,
    protocol: str = "p",
    better: Literal["lower", "higher"] = "lower",
    stderr: float | None = None,
) -> Measurement:
    """A figure named f."""
    return Measurement(name="f", value=value, protocol=protocol, better=better, stderr=stderr)


def compared(*states: StateRecord) -> list[before_after.Comparison]:
    """The comparison of a run with these states."""
    return before_after.compare(samples.make_report(states=states))


def test_difference_and_ratio_are_of_last_to_first() -> None:
    """States count by their stage, not by their place in the record."""
    (row,) = compared(state(2, figure(5.0)), state(0, figure(2.0)), state(1, figure(9.0)))
    assert (row.difference, row.ratio, row.verdict) == (3.0, 2.5, "worse")
    assert [m.value for m in row.measured if m] == [2.0, 9.0, 5.0]


def test_figures_of_different_protocols_do_not_meet() -> None:
    """One name by two protocols makes two rows, neither with a difference."""
    rows = compared(state(0, figure(2.0, protocol="a")), state(1, figure(3.0, protocol="b")))
    assert [(row.protocol, row.difference, row.ratio) for row in rows] == [
        ("a", None, None),
        ("b", None, None),
    ]


@pytest.mark.parametrize(
    ("before", "after", "better", "verdict"),
    [
        (figure(1.0), figure(2.0), "lower", "worse"),
        (figure(1.0), figure(2.0), "higher", "better"),
        (figure(2.0), figure(2.0), "lower", "same"),
        (figure(1.0, stderr=0.8), figure(2.0, stderr=0.7), "lower", "within error"),
        (figure(1.0, stderr=0.6), figure(2.0, stderr=0.6), "lower", "worse"),
        (figure(1.0), figure(math.inf), "lower", "worse"),
        (figure(math.inf), figure(math.inf), "lower", None),
    ],
)
def test_verdicts(
    before: Measurement,
    after: Measurement,
    better: Literal["lower", "higher"],
    verdict: str | None,
) -> None:
    """The verdict minds the direction, and standard errors add in squares."""
    pair = [m.model_copy(update={"better": better}) for m in (before, after)]
    (row,) = compared(state(0, pair[0]), state(1, pair[1]))
    assert row.verdict == verdict


def test_what_cannot_be_divided_has_no_ratio() -> None:
    """Zero before and infinity after give no ratio instead of an error."""
    (zero,) = compared(state(0, figure(0.0)), state(1, figure(1.0)))
    (infinite,) = compared(state(0, figure(1.0)), state(1, figure(math.inf)))
    assert (zero.difference, zero.ratio) == (1.0, None)
    assert (infinite.difference, infinite.ratio) == (None, None)


def test_one_state_is_before_and_not_after() -> None:
    """A run that only measured compares nothing."""
    (row,) = compared(state(0, figure(1.0)))
    assert row.before is not None and row.after is None and row.ratio is None


def test_sizes_show_every_pruned_state(report: RunReport) -> None:
    """One column for the original and one for each pruning stage; recoveries change no size."""
    table = before_after.size_table(report)
    labels = [column.heading for column in table.columns]
    assert labels == ["", "original", "after 1: slm", "after 2: torch_pruning", "change"]
    rows = [[typed(cell.text) for cell in row.cells] for row in table.rows]
    sizes = {name: cells for name, *cells in rows}
    assert sizes["layers"] == ["30", "27", "27", "-3 (-10.0%)"]
    assert sizes["MLP channels per layer"][-1] == "-176 (-11.5%)"
    assert len(sizes) == 7 and "query heads" in sizes
    # 2 tensors x layers x KV heads x head size.
    assert sizes["KV cache values per token"][:3] == ["11,520", "10,368", "6,912"]


def test_removal_is_said_in_layers_and_in_parameters(report: RunReport) -> None:
    """A bare percentage is ambiguous by up to one layer."""
    said = before_after.removed(report.before, report.after)
    assert said == "3 layers and 19.9% of the parameters removed"


def test_the_summary_is_one_sentence_for_every_kind_of_run(report: RunReport) -> None:
    """What was removed, what remains, and the time; also of a run that prunes nothing."""
    assert before_after.summary(report) == (
        "HuggingFaceTB/SmolLM2-135M-Instruct: 3 layers and 19.9% of the parameters removed in "
        "3 stages and 3 min 24 s; 27 layers and 107.7 M of 134.5 M parameters remain."
    )
    unpruned = samples.make_report(after=sample_plans.ORIGINAL)
    said = before_after.summary(unpruned)
    assert "0 layers and 0.0% of the parameters" in said and "30 layers and 134.5 M of" in said
    assert len(before_after.size_table(unpruned).rows) == 2


def test_a_standard_error_is_shown_beside_a_whole_number() -> None:
    """A row's decimals are enough for the error too, or it would read as 0."""
    before, after = (figure(value, stderr=0.5) for value in (20.0, 25.0))
    report = samples.make_report(states=(state(0, before), state(1, after)))
    (row,) = before_after.measurement_table(report).rows
    assert [typed(cell.text) for cell in row.cells[1:3]] == ["20.00 ± 0.50", "25.00 ± 0.50"]
