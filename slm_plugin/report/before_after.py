"""Comparison before and after a run: measurements, sizes, warnings and a summary."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from slm_plugin.evaluation.base import Measurement
from slm_plugin.models.view import Dimensions
from slm_plugin.plans import PruningPlan
from slm_plugin.report import numbers
from slm_plugin.report.record import RunReport, StateRecord

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
        return numbers.places(m.value for m in self.measured if m is not None)


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


@dataclass(frozen=True, slots=True)
class Size:
    """One dimension of the model in every state, as numbers; ``change`` in words."""

    name: str
    values: tuple[str, ...]
    change: str


def size_states(report: RunReport) -> list[tuple[str, Dimensions]]:
    """Label and dimensions of the original and of the model after every pruning stage."""
    pruned = [stage for stage in report.stages if stage.kind != "recovery"]
    stages = [(f"after {stage.number}: {stage.name}", stage.after) for stage in pruned]
    return [("original", report.before), *stages]


_MEASURES: tuple[tuple[str, Callable[[Dimensions], int]], ...] = (
    ("layers", lambda d: d.layers),
    ("parameters", lambda d: d.parameters),
    ("parameters of one layer", lambda d: d.layer_parameters),
    ("MLP channels of one layer", lambda d: d.intermediate_size),
    ("query heads", lambda d: d.attention_heads),
    ("key/value heads", lambda d: d.kv_heads),
    ("KV cache values per token", lambda d: 2 * d.layers * d.kv_heads * d.head_dim),
    ("head size", lambda d: d.head_dim),
    ("hidden size", lambda d: d.hidden_size),
    ("vocabulary", lambda d: d.vocab_size),
)


def sizes(report: RunReport) -> list[Size]:
    """Dimensions of the model in every state of `size_states`, and the total change."""
    states = [dimensions for _, dimensions in size_states(report)]
    return [
        Size(
            name,
            tuple(f"{measure(state):,}" for state in states),
            _difference(measure(report.before), measure(report.after)),
        )
        for name, measure in _MEASURES
    ]


def _difference(before: int, after: int) -> str:
    if before == after:
        return "unchanged"
    return f"{numbers.number(after - before, 0, signed=True)} " + (
        f"({numbers.change(before, after)})"
    )


def removed(before: Dimensions, after: Dimensions) -> str:
    """Removed layers and share of parameters; one without the other would be ambiguous."""
    share = (before.parameters - after.parameters) / before.parameters
    layers = numbers.plural(before.layers - after.layers, "layer")
    return f"{layers} and {share:.1%} of the parameters removed"


def summary(report: RunReport) -> str:
    """The run in one sentence."""
    before, after = report.before, report.after
    spent = (
        f"in {numbers.plural(len(report.stages), 'stage')} and {numbers.duration(report.seconds)}"
    )
    layers = numbers.plural(before.layers, "layer")
    if before.parameters == after.parameters:
        size = numbers.count(before.parameters)
        return f"{report.model} keeps its {layers} and {size} parameters, {spent}."
    share = (before.parameters - after.parameters) / before.parameters
    shrunk = (
        f"keeps its {layers} and shrinks"
        if before.layers == after.layers
        else f"shrinks from {before.layers} to {numbers.plural(after.layers, 'layer')} and"
    )
    return (
        f"{report.model} {shrunk} from {numbers.count(before.parameters)} to "
        f"{numbers.count(after.parameters)} parameters ({share:.1%} fewer), {spent}."
    )


def warnings(report: RunReport, plans: Mapping[str, PruningPlan]) -> list[tuple[int, str]]:
    """Stage number and text of every warning, without duplicates."""
    found = []
    for stage in report.stages:
        plan = plans.get(stage.plan) if stage.plan else None
        found += [(stage.number, text) for text in stage.warnings]
        found += [(stage.number, text) for text in (plan.warnings if plan else ())]
    return list(dict.fromkeys(found))
