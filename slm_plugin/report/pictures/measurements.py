"""Plots of measurements in every state, and of the training loss of a recovery."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_plugin.evaluation.base import Measurement
from slm_plugin.recovery.base import RecoveryRecord
from slm_plugin.report import numbers
from slm_plugin.report.before_after import Comparison, compare, ordered_states
from slm_plugin.report.pictures import canvas
from slm_plugin.report.record import RunReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Inches: a bar, the room above and below a chart's bars, left of them and right of them.
_COLUMNS = 3
_BAR, _HEAD, _LABELS, _FIGURES = 0.24, 0.75, 1.05, 0.75


def before_after(report: RunReport, name: str = "before-after") -> str:
    """A small chart for every figure that was measured in the first and the last state.

    Args:
        report: The run.
        name: Prefix of the ids; every chart has the id ``<name>-chart-<number>``, from 1.

    Returns:
        SVG; empty when no figure was taken twice by one protocol.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    rows = [row for row in compare(report) if row.before is not None and row.after is not None]
    if not rows:
        return ""
    labels = [state.label for state in ordered_states(report)]
    lines = [rows[start : start + _COLUMNS] for start in range(0, len(rows), _COLUMNS)]
    heights = [_HEAD + _BAR * max(len(_bars(row, labels)) for row in line) for line in lines]
    width = (canvas.WIDTH - 0.2) / _COLUMNS
    with canvas.sheet(name, sum(heights), f"{len(rows)} figures before and after") as sheet:
        for number, row in enumerate(rows):
            bars = _bars(row, labels)
            left = 0.1 + number % _COLUMNS * width + _LABELS
            top = sum(heights[: number // _COLUMNS]) + 0.5
            right = canvas.WIDTH - left - width + _LABELS + _FIGURES
            axes = sheet.axes(left, top, right, sheet.height - top - _BAR * len(bars))
            axes.set_gid(f"chart-{number + 1}")
            _chart(axes, row, bars)
    return sheet.svg


def _bars(row: Comparison, labels: Sequence[str]) -> list[tuple[str, str, Measurement]]:
    """Label, colour and measurement of the states in which a figure was measured."""
    colours = [canvas.PALE, *[canvas.SKY] * (len(labels) - 2), canvas.BLUE]
    states = zip(labels, colours, row.measured, strict=True)
    return [(label, colour, taken) for label, colour, taken in states if taken is not None]


def _chart(axes: Axes, row: Comparison, bars: Sequence[tuple[str, str, Measurement]]) -> None:
    ends = [taken.value + (taken.stderr or 0) for _, _, taken in bars]
    ends = [end if math.isfinite(end) else 0.0 for end in ends]
    starts = [taken.value for _, _, taken in bars if math.isfinite(taken.value)]
    for position, (_, colour, taken) in enumerate(bars):
        if math.isfinite(taken.value):
            axes.barh(position, taken.value, 0.66, color=colour)
            if taken.stderr:
                axes.errorbar(
                    taken.value, position, xerr=taken.stderr, color=canvas.INK, lw=1, capsize=2
                )
        axes.annotate(
            _figure(taken.value, row),
            (max(ends[position], 0), position),
            xytext=(4, 0),
            textcoords="offset points",
            va="center_baseline",
            fontweight="bold" if position == len(bars) - 1 else "normal",
            annotation_clip=False,
        )
    axes.set(xlim=(min(0.0, *starts, 0.0), max(*ends, 0.0) or 1.0), ylim=(len(bars) - 0.5, -0.5))
    axes.set_yticks(range(len(bars)), [_short(label, 16) for label, _, _ in bars])
    _caption(axes, row)


def _short(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def _figure(value: float, row: Comparison) -> str:
    """The value without its unit, which is in the caption; sizes keep their prefix."""
    unit = row.unit if row.unit in numbers.BYTE_UNITS else ""
    return numbers.quantity(value, unit, row.decimals)


def _caption(axes: Axes, row: Comparison) -> None:
    arrow = "\N{DOWNWARDS ARROW}" if row.better == "lower" else "\N{UPWARDS ARROW}"
    unit = f"{row.unit}, " if row.unit and row.unit not in numbers.BYTE_UNITS else ""
    edge = -72 * _LABELS + 6
    place: canvas.Look = {
        "xycoords": "axes fraction",
        "textcoords": "offset points",
        "va": "bottom",
    }
    axes.annotate(
        _short(row.name, 36),
        (0, 1),
        xytext=(edge, 17),
        fontweight="bold",
        **place,
    )
    axes.annotate(
        f"{unit}{arrow} {row.better} is better",
        (0, 1),
        xytext=(edge, 4),
        fontsize=8,
        color=canvas.MUTED,
        **place,
    )
    axes.set_xticks([])
    axes.tick_params(axis="y", length=0)
    axes.spines["bottom"].set_visible(False)


def losses(recovery: RecoveryRecord, name: str = "losses") -> str:
    """The training loss of a recovery over its steps.

    Returns:
        SVG; empty when fewer than two losses were recorded.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if len(recovery.losses) < 2:
        return ""
    steps = range(1, len(recovery.losses) + 1)
    with canvas.sheet(name, 2.2, f"Loss over {len(steps)} steps of {recovery.recovery}") as sheet:
        axes = sheet.axes(0.75, 0.2, 0.2, 0.55)
        axes.plot(steps, recovery.losses, color=canvas.BLUE, lw=1.4, gid="curve")
        axes.set(xlabel="step", ylabel="loss")
        canvas.whole_numbers(axes.xaxis)
        axes.margins(x=0.01)
        axes.grid(axis="y")
    return sheet.svg
