"""A run before and after: comparison of its figures, tables, warnings and a summary."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from rich.filesize import decimal

from slm_plugin.evaluation.base import Measurement
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.families import reads_tensors
from slm_plugin.plans import PruningPlan
from slm_plugin.report import numbers
from slm_plugin.report.record import RunReport, StateRecord
from slm_plugin.report.table import DASH, Cell, Column, Row, Table

Verdict = Literal["better", "worse", "within error", "same"]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One figure in every state of the model.

    Attributes:
        measured: One measurement per state, in order; None where it was not measured.
    """

    name: str
    protocol: str
    unit: str
    better: Literal["lower", "higher"]
    measured: tuple[Measurement | None, ...]

    @property
    def before(self) -> Measurement | None:
        """The figure in the first state."""
        return self.measured[0]

    @property
    def after(self) -> Measurement | None:
        """The figure in the last state; None when there is only one state."""
        return self.measured[-1] if len(self.measured) > 1 else None

    @property
    def difference(self) -> float | None:
        """After minus before, where both are finite."""
        if self.before is None or self.after is None:
            return None
        difference = self.after.value - self.before.value
        return difference if math.isfinite(difference) else None

    @property
    def ratio(self) -> float | None:
        """After divided by before, where both are finite and before is not 0."""
        if self.difference is None or self.before is None or self.after is None:
            return None
        return self.after.value / self.before.value if self.before.value else None

    @property
    def verdict(self) -> Verdict | None:
        """Whether the change is an improvement, unless it is within the standard error."""
        if self.before is None or self.after is None:
            return None
        difference = self.after.value - self.before.value
        if math.isnan(difference) or difference == 0:
            return "same" if difference == 0 else None
        if abs(difference) <= math.hypot(self.before.stderr or 0, self.after.stderr or 0):
            return "within error"
        return "better" if (difference > 0) == (self.better == "higher") else "worse"

    @property
    def decimals(self) -> int:
        """Decimal places that all figures of the row share."""
        found = [m for m in self.measured if m is not None]
        return numbers.places([*(m.value for m in found), *(m.stderr or 0 for m in found)])

    @property
    def label(self) -> str:
        """The name, with the unit where the figures do not carry it."""
        return self.name if self.unit in ("", *numbers.BYTE_UNITS) else f"{self.name} ({self.unit})"

    def figure(self, value: float, *, signed: bool = False) -> str:
        """A value without its unit; bytes have a prefix."""
        unit = self.unit if self.unit in numbers.BYTE_UNITS else ""
        return numbers.quantity(value, unit, self.decimals, signed=signed)

    def cell(self, measured: Measurement | None, *, error: bool = True) -> Cell:
        """A measurement, with its standard error if asked to."""
        if measured is None:
            return Cell(DASH)
        stderr = measured.stderr if error else None
        shown = f" ± {numbers.number(stderr, self.decimals)}" if stderr else ""
        return Cell(self.figure(measured.value) + shown)

    def change_cells(self) -> tuple[Cell, Cell]:
        """Difference and ratio of the last state to the first."""
        style = self.verdict or ""
        difference = self.difference
        shown = DASH if difference is None else self.figure(difference, signed=True)
        ratio = DASH if self.ratio is None else numbers.ratio(self.ratio)
        return Cell(shown, style), Cell(ratio, style)


def ordered_states(report: RunReport) -> tuple[StateRecord, ...]:
    """The measured states, first to last."""
    return tuple(sorted(report.states, key=lambda state: state.stage))


def compare(report: RunReport) -> list[Comparison]:
    """All figures of a run, each with its values in every state, in the order of measurement.

    Only measurements with the same name and protocol share a row.
    """
    states = ordered_states(report)
    taken = [{(m.name, m.protocol): m for m in state.measurements} for state in states]
    keys = dict.fromkeys(key for state in taken for key in state)
    rows = []
    for key in keys:
        measured = tuple(state.get(key) for state in taken)
        example = next(m for m in measured if m is not None)
        rows.append(Comparison(*key, example.unit, example.better, measured))
    return rows


CACHE = "KV cache values per token"
_SIZES: tuple[tuple[str, Callable[[Dimensions], int]], ...] = (
    ("layers", lambda d: d.layers),
    ("parameters", lambda d: d.parameters),
    ("parameters per layer", lambda d: _per_layer_parameters(d)),
    ("hidden size", lambda d: d.hidden_size),
    ("MLP channels per layer", lambda d: round(sum(d.widths) / d.layers)),
    ("query heads", lambda d: d.attention_heads),
    ("key/value heads", lambda d: d.kv_heads),
    ("experts of one layer", lambda d: d.experts),
    (CACHE, lambda d: 2 * d.layers * d.kv_heads * d.head_dim),
)


def _per_layer_parameters(model: Dimensions) -> int:
    """Mean over the layers, which may differ in width."""
    narrower = model.layers * model.intermediate_size - sum(model.widths)
    return model.layer_parameters - round(narrower * model.channel_parameters / model.layers)


def size_table(report: RunReport) -> Table:
    """Layers, parameters and what else changed, in the original and after every pruning stage."""
    stages = [stage for stage in report.stages if stage.kind != "recovery"]
    states = [report.before, *(stage.after for stage in stages)]
    labels = ["original", *(f"after {stage.number}: {stage.name}" for stage in stages)]
    rows = []
    for name, measure in _SIZES:
        if name == CACHE and reads_tensors(report.after.architecture, report.after.stack):
            continue
        before, after = measure(report.before), measure(report.after)
        if before != after or name in ("layers", "parameters"):
            difference = numbers.number(after - before, 0, signed=True)
            change = f"{difference} ({numbers.change(before, after)})"
            shown = (name, *(f"{measure(state):,}" for state in states), change)
            rows.append(Row(tuple(map(Cell, shown))))
    return Table(_columns("", *labels, "change"), tuple(rows))


def measurement_table(report: RunReport) -> Table:
    """Every figure in every state with its standard error; the notes are the protocols."""
    labels = [state.label for state in ordered_states(report)]
    compared = ("difference", "ratio", "") if len(labels) > 1 else ()
    rows = []
    for row in compare(report):
        verdict = Cell(row.verdict or "", row.verdict or "")
        cells = (Cell(row.label), *map(row.cell, row.measured), *row.change_cells(), verdict)
        rows.append(Row(cells[: 1 + len(labels) + len(compared)], row.protocol))
    return Table(_columns("figure", *labels, *compared), tuple(rows))


def summary_table(report: RunReport) -> Table:
    """Layers, parameters and every figure before and after the run, for the terminal."""
    rows = []
    for name in ("layers", "parameters"):
        before, after = getattr(report.before, name), getattr(report.after, name)
        difference = numbers.number(after - before, 0, signed=True)
        shown = (name, f"{before:,}", f"{after:,}", difference, numbers.ratio(after / before))
        rows.append(Row(tuple(map(Cell, shown))))
    for row in compare(report):
        if row.name != "parameters":
            states = (row.cell(m, error=False) for m in (row.before, row.after))
            cells = (Cell(row.label), *states, *row.change_cells())
            rows.append(Row(cells, row.protocol, section=len(rows) == 2))
    columns = _columns("", "before", "after", "difference", "ratio")
    return Table(columns, tuple(rows), report.title, summary(report))


def export_table(report: RunReport) -> Table:
    """Folder, size and checks of every export."""
    rows = []
    for export in report.exports:
        checks = "; ".join(
            f"{check.name} {_brief(check.value, check.unit)} "
            f"(allowed {_brief(check.tolerance, check.unit)})"
            for check in export.checks
        )
        size = decimal(export.size_bytes)
        if export.padding:
            size += f", {export.padding:,} parameters are zero padding"
        folder = Cell(export.folder, "code")
        rows.append(Row((Cell(export.exporter), folder, Cell(size), Cell(checks or "no check"))))
    heads = ("export", "folder", "size", "check against the model in memory")
    return Table(tuple(Column(name, words=name != "size") for name in heads), tuple(rows))


def _brief(value: float, unit: str) -> str:
    return f"{value:.3g} {unit}".rstrip()


def _columns(first: str, *others: str) -> tuple[Column, ...]:
    return Column(first, words=True), *map(Column, others)


def removed(before: Dimensions, after: Dimensions) -> str:
    """Removed layers and share of parameters; one without the other would be ambiguous."""
    share = (before.parameters - after.parameters) / before.parameters
    layers = numbers.plural(before.layers - after.layers, "layer")
    return f"{layers} and {share:.1%} of the parameters removed"


def summary(report: RunReport) -> str:
    """The run in one sentence."""
    before, after = report.before, report.after
    stages = numbers.plural(len(report.stages), "stage")
    layers = numbers.plural(after.layers, "layer")
    left = f"{numbers.count(after.parameters)} of {numbers.count(before.parameters)} parameters"
    return (
        f"{report.model}: {removed(before, after)} in {stages} and "
        f"{numbers.duration(report.seconds)}; {layers} and {left} remain."
    )


def warnings(report: RunReport, plans: Mapping[str, PruningPlan]) -> list[tuple[int, str]]:
    """Stage number and text of every warning, without duplicates."""
    found = []
    for stage in report.stages:
        plan = plans.get(stage.plan) if stage.plan else None
        found += [(stage.number, text) for text in stage.warnings]
        found += [(stage.number, text) for text in (plan.warnings if plan else ())]
    return list(dict.fromkeys(found))
