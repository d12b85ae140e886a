"""Scatter plots of quality against size or speed, with the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, TypeGuard

from slm_plugin.comparison.pareto import pareto_front
from slm_plugin.comparison.table import PARAMETERS, Column, Row
from slm_plugin.report import canvas, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A model this many times worse than the best one is an outlier that would compress the scale.
OUTLIER = 30.0


def pareto_plot(rows: Sequence[Row], x: Column, y: Column, name: str = "front") -> str:
    """A scatter of the rows, numbered and listed beside it, with their Pareto front.

    Args:
        rows: The rows of the table. Those without a finite value are left out; on the logarithmic
            axis of a loss so are values that are not positive or above `OUTLIER` times the lowest.
        x: The horizontal axis.
        y: The vertical axis.
        name: Prefix of the ids; every point has the id ``<name>-point-<row>``, and the front
            ``<name>-line``.

    Returns:
        SVG; empty where there are fewer than two points.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    values = enumerate(zip(x.values, y.values, strict=True))
    points = {row: (a, b) for row, (a, b) in values if _drawable(a, x) and _drawable(b, y)}
    if _log(y):
        bar = OUTLIER * min((b for _, b in points.values()), default=0.0)
        points = {row: point for row, point in points.items() if point[1] <= bar}
    if len(points) < 2:
        return ""
    signs = [-1 if axis.better == "higher" else 1 for axis in (x, y)]
    costs = [(signs[0] * a, signs[1] * b) for a, b in points.values()]
    front = [list(points)[index] for index in pareto_front(costs)]
    listed = _list(rows, points)
    height = max(4.2, 0.17 * len(listed) + 0.3)
    description = f"{y.name} against {x.name} of {len(points)} models"
    with canvas.sheet(name, height, description) as sheet:
        axes, beside = sheet.figure.subplots(1, 2, width_ratios=(5, 2))
        # A step line: no model lies between two points.
        stairs = "steps-pre" if x.better == "higher" else "steps-post"
        corners = zip(*sorted(points[row] for row in front), strict=True)
        axes.plot(*corners, color=canvas.SKY, lw=1.6, drawstyle=stairs, zorder=1, gid="line")
        # Points of one target have about one x: by height, numbers take turns at six distances.
        for place, row in enumerate(sorted(points, key=lambda row: points[row][1])):
            distance = (6 + 16 * (place // 2 % 3)) * (1 if place % 2 else -1)
            _point(axes, row, points[row], distance, front=row in front)
        _scales(axes, x, y)
        beside.axis("off")
        beside.text(0, 1, "\n".join(listed), va="top", fontsize=8, linespacing=1.4)
    return sheet.svg


def _log(column: Column) -> bool:
    """Whether a column is a loss, which has a logarithmic axis."""
    return column.quality and column.better == "lower"


def _drawable(value: float | None, column: Column) -> TypeGuard[float]:
    return value is not None and math.isfinite(value) and (value > 0 or not _log(column))


def _list(rows: Sequence[Row], points: Iterable[int]) -> list[str]:
    """A line for every point, below the heading of its target."""
    lines: list[str] = []
    target = ""
    for number in points:
        row = rows[number]
        if row.target != target:
            target = row.target
            lines.append(canvas.short(target, 44))
        indent = "\N{NO-BREAK SPACE}" * 2 if target else ""
        lines.append(f"{indent}{number + 1} {canvas.short(row.name, 42)}")
    return lines


def _point(axes: Axes, row: int, point: tuple[float, float], distance: int, *, front: bool) -> None:
    colour = canvas.BLUE if front else canvas.MUTED
    look: dict[str, Any] = {
        "color": colour,
        "mfc": colour if front else "white",
        "ms": 5.5,
        "zorder": 3,
    }
    axes.plot(*point, "o", gid=f"point-{row}", **look)
    axes.annotate(
        str(row + 1),
        point,
        xytext=(distance, 0),
        textcoords="offset points",
        ha="left" if distance > 0 else "right",
        va="center",
        fontsize=8,
        arrowprops={"arrowstyle": "-", "color": canvas.PALE, "shrinkA": 0, "shrinkB": 3},
    )


def _scales(axes: Axes, x: Column, y: Column) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.margins(0.1)
    if _log(y):
        axes.set_yscale("log")
        low, high = axes.yaxis.get_view_interval()
        # An axis that spans little would be left bare by 1, 2 and 5 of every decade.
        narrow = high < 5 * low
        axes.yaxis.set_major_locator(MaxNLocator(6) if narrow else LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())
        # Powers would need mathematical text.
        axes.yaxis.set_major_formatter("{x:g}")
    if x.name == PARAMETERS:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: numbers.count(round(value))))
    axes.set(xlabel=f"{x.name} ({x.better} is better)", ylabel=f"{y.name} ({y.better} is better)")
    axes.grid()
    axes.set_title("blue: on the Pareto front", fontweight="normal", fontsize=8.5)
