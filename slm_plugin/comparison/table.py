"""The comparison table: a row per cell, a column per figure, and the best values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rich.filesize import decimal

from slm_plugin.comparison.record import Cell, ComparisonReport
from slm_plugin.evaluation.base import Measurement
from slm_plugin.report import numbers, table

Better = Literal["lower", "higher"]
MEAN, PARAMETERS = "zero-shot mean", "parameters"
# Figures that repeat another column: parameters, and speeds as times.
_REPEATED = (PARAMETERS, "prefill time", "decode time per step")
_WORDS = ("method", "recovery", "target", "remark")
_TIME = "planning and recovery, without loading, surgery and measuring"
_MEMORY = (
    "largest growth of the process (on CUDA of PyTorch's memory) while planning or recovering, "
    "beyond what it held before"
)
# Evaluators that measure the quality of a model.
_QUALITY = ("perplexity", "lm_eval")


@dataclass(frozen=True, slots=True)
class Column:
    """One figure of every row.

    Attributes:
        name: Its heading, with the unit.
        protocol: How it was measured.
        better: Which direction is better; None where neither is.
        values: A number per row; None where it was not measured.
        show: Formats a number.
        stderrs: The standard error of each, where there is one.
        quality: Whether it measures quality, not cost.
        detail: Whether it is shown in files only, not in the terminal.
    """

    name: str
    protocol: str
    better: Better | None
    values: tuple[float | None, ...]
    show: Callable[[float], str]
    stderrs: tuple[float | None, ...] = ()
    quality: bool = False
    detail: bool = False

    def shown(self, row: int) -> str:
        """The figure of a row with its standard error; a dash where there is none."""
        value = self.values[row]
        if value is None:
            return table.DASH
        stderr = self.stderrs[row] if self.stderrs else None
        if not stderr:
            return self.show(value)
        digits = numbers.places([value, stderr])
        return f"{numbers.number(value, digits)} ±{numbers.number(stderr, digits)}"

    def sorted_by(self, row: int) -> str:
        """The value as JavaScript reads it; empty where there is none."""
        value = self.values[row]
        return "" if value is None else str(value).replace("inf", "Infinity")


@dataclass(frozen=True, slots=True)
class Row:
    """The text cells of a row.

    Attributes:
        remark: Errors, warnings and notes about the time.
        group: Number of its target, from 1; 0 for the dense model.
    """

    label: str
    recovered: str
    target: str
    remark: str
    group: int

    @property
    def name(self) -> str:
        """Method and recovery together."""
        return f"{self.label} + {self.recovered}" if self.recovered else self.label


def rows(report: ComparisonReport) -> list[Row]:
    """The text cells of all rows, in the order of the cells."""
    targets = list(dict.fromkeys(cell.target for cell in report.cells))
    return [
        Row(
            label=cell.label,
            recovered=cell.recovered,
            target=cell.target.describe() if cell.target else "",
            remark="; ".join(_remarks(cell)),
            group=targets.index(cell.target),
        )
        for cell in report.cells
    ]


def _remarks(cell: Cell) -> Iterable[str]:
    if cell.error:
        yield cell.error
    if cell.planning is not None and cell.planning.known_trials:
        yield f"time is a lower bound: {cell.planning.known_trials} trials came from a journal"
    yield from cell.warnings


def columns(report: ComparisonReport) -> list[Column]:
    """All columns: layers removed, parameters left, measured figures, and the method's cost."""
    cells, dense = report.cells, report.dense
    removed = (None if c.after is None else dense.layers - c.after.layers for c in cells)
    parameters = (None if c.after is None else c.after.parameters for c in cells)
    seconds, memory = (c.seconds for c in cells), (c.memory for c in cells)
    return [
        Column("layers removed", "", None, tuple(removed), _whole),
        Column(PARAMETERS, "tied weights counted once", "lower", tuple(parameters), _whole),
        *_figures(cells),
        Column("time of the method", _TIME, "lower", tuple(seconds), numbers.duration),
        Column("memory of the method", _MEMORY, "lower", tuple(memory), _bytes, detail=True),
    ]


def _figures(cells: Sequence[Cell]) -> Iterable[Column]:
    """The columns of every evaluator; the mean over tasks comes before the tasks."""
    for evaluator in dict.fromkeys(name for cell in cells for name in cell.measured):
        mean = list(_mean(cells)) if evaluator == "lm_eval" else []
        yield from mean
        yield from _measured(cells, evaluator, detail=bool(mean))


def _measured(cells: Sequence[Cell], evaluator: str, *, detail: bool) -> Iterable[Column]:
    """A column for every pair of figure and protocol."""
    taken = [{(m.name, m.protocol): m for m in cell.measured.get(evaluator, ())} for cell in cells]
    for key in dict.fromkeys(key for one in taken for key in one):
        if key[0] in _REPEATED:
            continue
        found = [one.get(key) for one in taken]
        example = next(m for m in found if m is not None)
        sized = example.unit in numbers.BYTE_UNITS
        unit = f" ({example.unit})" if example.unit and not sized else ""
        yield Column(
            f"{example.name}{unit}",
            example.protocol,
            example.better,
            tuple(None if m is None else m.value for m in found),
            _bytes if sized else numbers.number,
            tuple(None if m is None else m.stderr for m in found),
            quality=evaluator in _QUALITY,
            detail=detail,
        )


def _mean(cells: Sequence[Cell]) -> Iterable[Column]:
    """The mean over zero-shot tasks, where there are several."""
    scored = [_task_scores(cell.measured.get("lm_eval", ())) for cell in cells]
    tasks = list(dict.fromkeys(task for one in scored for task in one))
    if len(tasks) < 2:
        return
    means = [_mean_of(one, tasks) for one in scored]
    yield Column(
        MEAN,
        f"mean over {len(tasks)} tasks of acc_norm, or of acc where a task has no acc_norm; "
        "standard errors as of independent tasks",
        "higher",
        tuple(None if one is None else one[0] for one in means),
        numbers.number,
        tuple(None if one is None else one[1] for one in means),
        quality=True,
    )


def _task_scores(measurements: Iterable[Measurement]) -> dict[str, Measurement]:
    """The score of each task that enters the mean."""
    found: dict[str, Measurement] = {}
    for measurement in measurements:
        task, _, metric = measurement.name.partition(" ")
        if metric == "acc_norm" or (metric == "acc" and task not in found):
            found[task] = measurement
    return found


def _mean_of(
    scores: Mapping[str, Measurement], tasks: list[str]
) -> tuple[float, float | None] | None:
    """Mean and standard error; None where a task is missing."""
    if set(scores) != set(tasks):
        return None
    mean = sum(scores[task].value for task in tasks) / len(tasks)
    stderrs = [scores[task].stderr for task in tasks]
    known = [one for one in stderrs if one is not None]
    return mean, math.hypot(*known) / len(tasks) if len(known) == len(tasks) else None


def _whole(value: float) -> str:
    return numbers.number(value, 0)


def _bytes(value: float) -> str:
    return decimal(round(value)) if math.isfinite(value) else numbers.number(value)


def best(column: Column, listed: list[Row]) -> set[int]:
    """Rows with the best value for their target.

    A value that more than half of the rows share, such as the target size, marks none.
    """
    found: set[int] = set()
    if column.better is None:
        return found
    for group in {row.group for row in listed} - {0}:
        values = {
            index: value
            for index, (row, value) in enumerate(zip(listed, column.values, strict=True))
            if row.group == group and value is not None and not math.isnan(value)
        }
        if not values:
            continue
        top = min(values.values()) if column.better == "lower" else max(values.values())
        equal = {index for index, value in values.items() if value == top}
        if len(equal) <= len(values) / 2:
            found |= equal
    return found


def comparison_table(report: ComparisonReport, *, brief: bool = False) -> table.Table:
    """The comparison as a table, with the best values of every target marked.

    Args:
        report: The comparison.
        brief: For the terminal: one column of words, errors as notes, and no details.
    """
    listed = rows(report)
    shown = [column for column in columns(report) if not (brief and column.detail)]
    winners = [best(column, listed) for column in shown]
    made = []
    for index, row in enumerate(listed):
        figures = [
            table.Cell(column.shown(index), "best" if index in won else "", column.sorted_by(index))
            for column, won in zip(shown, winners, strict=True)
        ]
        section = bool(index) and row.group != listed[index - 1].group
        if brief:
            cells = (table.Cell(row.name), *figures)
        else:
            words = (
                table.Cell(text or table.DASH, "", text) for text in (row.recovered, row.target)
            )
            cells = (table.Cell(row.label), *words, *figures, table.Cell(row.remark, "remark"))
        made.append(table.Row(cells, report.cells[index].error if brief else "", section))
    first, *others = (table.Column(name, words=True) for name in _WORDS)
    heads = [table.Column(column.name, better=column.better or "") for column in shown]
    heads = [first, *heads] if brief else [first, *others[:2], *heads, *others[2:]]
    return table.Table(tuple(heads), tuple(made), report.title if brief else "")
