"""Scatter plots of quality against size or speed, with the Pareto front."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from slm_plugin.comparison.pareto import pareto_front
from slm_plugin.report import numbers
from slm_plugin.report.pictures import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Box = tuple[float, float, float, float]

# A model this many times worse than the best one is an outlier that would compress the scale.
OUTLIER = 30.0

_MARKERS = "os^vDPX*"
# In points: width of a letter, height of a line, distance of a label from its marker, font size.
_LETTER, _LINE, _GAP, _SIZE = 4.3, 10.0, 7.0, 8.0


@dataclass(frozen=True, slots=True)
class Point:
    """One row of a comparison.

    Attributes:
        row: Number of the row, used in the id.
        label: Text beside the point.
        group: Points of one group share a marker; empty for the dense model.
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
    """A scatter of points with their Pareto front.

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
    on_front = pareto_front([(x.cost(point.x), y.cost(point.y)) for point in points])
    description = f"{y.label} against {x.label} of {len(points)} models"
    with canvas.sheet(name, 4.6, description) as sheet:
        axes = sheet.axes(0.8, 0.45, 0.2, 0.55)
        groups = list(dict.fromkeys(point.group for point in points if point.group))
        _line(axes, sorted((points[i].x, points[i].y) for i in on_front), x)
        for index, point in enumerate(points):
            _marker(axes, point, groups, index in on_front)
        _scales(axes, x, y)
        _legend(axes, groups)
        # Points on the front get their labels first.
        order = sorted(range(len(points)), key=lambda i: (i not in on_front, points[i].y))
        _labels(axes, [points[i] for i in order], 72 / sheet.figure.dpi)
    return sheet.svg


def _drawable(value: float, scale: Scale) -> bool:
    return math.isfinite(value) and (value > 0 or not scale.log)


def _line(axes: Axes, corners: Sequence[tuple[float, float]], x: Scale) -> None:
    """A step line: no model lies between two points."""
    stairs = "steps-post" if x.better == "lower" else "steps-pre"
    xs, ys = zip(*corners, strict=True)
    axes.plot(xs, ys, color=canvas.SKY, lw=1.6, drawstyle=stairs, zorder=1, gid="line")


def _marker(axes: Axes, point: Point, groups: Sequence[str], best: bool) -> None:
    colour = canvas.BLUE if best else canvas.MUTED
    look: canvas.Look = {"marker": "D", "color": canvas.INK if not best else canvas.BLUE}
    if point.group:
        marker = _MARKERS[groups.index(point.group) % len(_MARKERS)]
        look = {"marker": marker, "color": colour, "mfc": colour if best else "white"}
    axes.plot([point.x], [point.y], ls="", ms=5.5, zorder=3, gid=f"point-{point.row}", **look)


def _scales(axes: Axes, x: Scale, y: Scale) -> None:
    from matplotlib.ticker import FuncFormatter

    axes.margins(x=0.22, y=0.12)
    for scale, axis in ((x, axes.xaxis), (y, axes.yaxis)):
        if scale.log:
            axes.set(**{f"{axis.axis_name}scale": "log"})
            canvas.plain_decades(axis)
        if scale.counts:
            axis.set_major_formatter(FuncFormatter(lambda value, _: numbers.count(round(value))))
    axes.set(xlabel=f"{x.label} ({x.better} is better)", ylabel=f"{y.label} ({y.better} is better)")
    axes.grid(axis="both")
    # Compute the limits now, because label placement needs pixel positions.
    axes.autoscale_view()


def _legend(axes: Axes, groups: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    shown: list[tuple[str, canvas.Look]] = [
        ("on the Pareto front", {"marker": "o", "color": canvas.BLUE})
    ]
    if len(groups) > 1:
        shown += [
            (group, {"marker": _MARKERS[n % len(_MARKERS)], "color": canvas.MUTED, "mfc": "white"})
            for n, group in enumerate(groups)
        ]
    axes.legend(
        handles=[Line2D([], [], ls="", ms=5.5, label=text, **look) for text, look in shown],
        loc="lower left",
        bbox_to_anchor=(-0.01, 1.0),
        ncols=len(shown),
        borderaxespad=0.2,
    )


def _labels(axes: Axes, points: Sequence[Point], scale: float) -> None:
    """Write every label at the nearest free place; leave it out where there is none.

    Args:
        axes: The axes, with final scales and limits.
        points: The most important first.
        scale: Points per pixel.
    """
    pixels = axes.transData.transform([(point.x, point.y) for point in points])
    places = [(float(x) * scale, float(y) * scale) for x, y in pixels]
    taken: list[Box] = [(x - 4, y - 4, x + 4, y + 4) for x, y in places]
    left, bottom, right, top = (float(edge) * scale for edge in axes.bbox.extents)
    for point, (x, y) in zip(points, places, strict=True):
        width = _LETTER * len(point.label)
        boxes = {way: _box(x, y, *way, width) for way in _offsets()}
        free = [
            way
            for way, box in boxes.items()
            if left <= box[0] and bottom <= box[1] and box[2] <= right and box[3] <= top
            if not any(_overlap(box, other) for other in taken)
        ]
        if free:
            taken.append(boxes[free[0]])
            _write(axes, point, *free[0])


def _offsets() -> list[tuple[int, float]]:
    """Label positions, the nearest first: side, and vertical offset in points."""
    heights = [
        step * _LINE / 2 * sign for step in range(30) for sign in ((1, -1) if step else (1,))
    ]
    return [(side, height) for height in heights for side in (1, -1)]


def _box(x: float, y: float, side: int, rise: float, width: float) -> Box:
    start = x + side * _GAP
    left, right = sorted((start, start + side * width))
    return left, y + rise - _LINE / 2, right, y + rise + _LINE / 2


def _overlap(one: Box, other: Box) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _write(axes: Axes, point: Point, side: int, rise: float) -> None:
    pointer: canvas.Look | None = None
    if abs(rise) > _LINE / 2:
        pointer = {
            "arrowstyle": "-",
            "color": canvas.PALE,
            "lw": 0.7,
            "relpos": (0.0 if side > 0 else 1.0, 0.5),
            "shrinkA": 0,
            "shrinkB": 3,
        }
    axes.annotate(
        point.label,
        (point.x, point.y),
        xytext=(side * _GAP, rise),
        textcoords="offset points",
        ha="left" if side > 0 else "right",
        va="center",
        fontsize=_SIZE,
        arrowprops=pointer,
        zorder=2,
    )
