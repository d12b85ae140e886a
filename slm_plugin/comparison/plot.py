"""Scatter plots of quality against size or speed, with the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from slm_plugin.comparison.pareto import pareto_front
from slm_plugin.report import canvas, numbers

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A model this many times worse than the best one is an outlier that would compress the scale.
OUTLIER = 30.0


@dataclass(frozen=True, slots=True)
class Point:
    """One row of a comparison.

    Attributes:
        row: Number of the row, from 0; the point has the next one written beside it.
        label: Text of the point in the list beside the plot.
        group: Heading above the points of one target in that list; empty for the dense model.
        x: Value on the horizontal axis.
        y: Value on the vertical axis.
    """

    row: int
    label: str
    group: str
    x: float
    y: float


@dataclass(frozen=True, slots=True)
class Scale:
    """One axis: its label, which direction is better, and its scale."""

    label: str
    better: Literal["lower", "higher"]
    log: bool = False
    counts: bool = False

    def cost(self, value: float) -> float:
        """The value as a cost, lower is better."""
        return value if self.better == "lower" else -value


def pareto_plot(points: Sequence[Point], x: Scale, y: Scale, name: str = "front") -> str:
    """A scatter of numbered points with their Pareto front, and the list of the numbers beside it.

    Args:
        points: Points that are not finite are left out. On a logarithmic axis so are points that
            are not positive and points above `OUTLIER` times the lowest.
        x: The horizontal axis.
        y: The vertical axis.
        name: Prefix of the ids; every point has the id ``<name>-point-<row>``, and the front
            ``<name>-line``.

    Returns:
        SVG; empty where there are fewer than two points.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    points = [p for p in points if _drawable(p.x, x) and _drawable(p.y, y)]
    if y.log and points:
        bar = OUTLIER * min(point.y for point in points)
        points = [point for point in points if point.y <= bar]
    if len(points) < 2:
        return ""
    front = pareto_front([(x.cost(point.x), y.cost(point.y)) for point in points])
    listed = _list(points)
    height = max(4.2, 0.17 * len(listed) + 0.3)
    description = f"{y.label} against {x.label} of {len(points)} models"
    with canvas.sheet(name, height, description) as sheet:
        axes, beside = sheet.figure.subplots(1, 2, width_ratios=(3, 1))
        # A step line: no model lies between two points.
        stairs = "steps-post" if x.better == "lower" else "steps-pre"
        corners = zip(*sorted((points[i].x, points[i].y) for i in front), strict=True)
        axes.plot(*corners, color=canvas.SKY, lw=1.6, drawstyle=stairs, zorder=1, gid="line")
        # Points of one target have about one x: numbers alternate between both sides, by height.
        for place, index in enumerate(sorted(range(len(points)), key=lambda i: points[i].y)):
            _numbered(axes, points[index], front=index in front, side=1 if place % 2 else -1)
        _scales(axes, x, y)
        beside.axis("off")
        beside.text(0, 1, "\n".join(listed), va="top", fontsize=8, linespacing=1.4)
    return sheet.svg


def _drawable(value: float, scale: Scale) -> bool:
    return math.isfinite(value) and (value > 0 or not scale.log)


def _list(points: Sequence[Point]) -> list[str]:
    """A line for every point, below the heading of its group."""
    lines: list[str] = []
    for group in dict.fromkeys(point.group for point in points):
        lines += [canvas.short(group, 36)] if group else []
        members = (point for point in points if point.group == group)
        indent = "\N{NO-BREAK SPACE}" * 2 if group else ""
        lines += [f"{indent}{point.row + 1} {canvas.short(point.label, 34)}" for point in members]
    return lines


def _numbered(axes: Axes, point: Point, *, front: bool, side: int) -> None:
    colour = canvas.BLUE if front else canvas.MUTED
    fill = colour if front else "white"
    gid = f"point-{point.row}"
    axes.plot([point.x], [point.y], "o", ms=5.5, color=colour, mfc=fill, zorder=3, gid=gid)
    axes.annotate(
        str(point.row + 1),
        (point.x, point.y),
        xytext=(6 * side, 0),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="center",
        fontsize=8,
    )


def _scales(axes: Axes, x: Scale, y: Scale) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.margins(0.1)
    for scale, axis in ((x, axes.xaxis), (y, axes.yaxis)):
        if scale.log:
            axes.set(**{f"{axis.axis_name}scale": "log"})
            low, high = axis.get_view_interval()
            # An axis that spans little would be left bare by 1, 2 and 5 of every decade.
            axis.set_major_locator(
                MaxNLocator(6) if high < 5 * low else LogLocator(subs=(1.0, 2.0, 5.0))
            )
            axis.set_minor_locator(NullLocator())
            # Powers would need mathematical text.
            axis.set_major_formatter("{x:g}")
        if scale.counts:
            axis.set_major_formatter(FuncFormatter(lambda value, _: numbers.count(round(value))))
    axes.set(xlabel=f"{x.label} ({x.better} is better)", ylabel=f"{y.label} ({y.better} is better)")
    axes.grid()
    axes.set_title("blue: on the Pareto front", fontweight="normal", fontsize=8.5)
