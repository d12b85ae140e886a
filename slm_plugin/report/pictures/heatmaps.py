"""Heatmaps of pairwise layer measures, side by side on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from slm_plugin.report.pictures import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.image import AxesImage

Matrix = Sequence[Sequence[float]]

# Inches: beside, between and above the maps, below them, and the scale with its numbers.
_LEFT, _GAP, _TOP, _BOTTOM, _SCALE = 0.55, 0.4, 0.35, 0.5, 0.75
_LARGEST = 3.3


def heatmaps(maps: Mapping[str, Matrix], name: str) -> str:
    """Square maps on one colour scale, from the lowest value of all of them to the highest.

    Args:
        maps: Values by title, ``(layers, layers)`` each; row and column 0 are lowest and leftmost.
        name: Prefix of the ids; every map has the id ``<name>-map-<number>``, from 1.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    values = [value for matrix in maps.values() for row in matrix for value in row]
    room = canvas.WIDTH - _LEFT - _SCALE - _GAP * (len(maps) - 1)
    side = min(_LARGEST, room / len(maps))
    height = _TOP + side + _BOTTOM
    with canvas.sheet(name, height, f"Heatmaps over layers: {', '.join(maps)}") as sheet:
        left = _LEFT
        for number, (title, matrix) in enumerate(maps.items(), start=1):
            axes = sheet.axes(left, _TOP, canvas.WIDTH - left - side, _BOTTOM)
            drawn = _map(axes, matrix, min(values), max(values))
            drawn.set_gid(f"map-{number}")
            axes.set(title=title, xlabel="layer")
            if number == 1:
                axes.set_ylabel("layer")
            left += side + _GAP
        left += 0.15 - _GAP
        scale = sheet.axes(left, _TOP, canvas.WIDTH - left - 0.13, _BOTTOM)
        _colour_scale(scale, min(values), max(values))
    return sheet.svg


def _map(axes: Axes, matrix: Matrix, low: float, high: float) -> AxesImage:
    drawn = axes.imshow(
        matrix,
        cmap=_colours(),
        vmin=low,
        vmax=high,
        origin="lower",
        interpolation="none",
        aspect="auto",
    )
    axes.grid(visible=False)
    for axis in (axes.xaxis, axes.yaxis):
        canvas.whole_numbers(axis, 7)
    return drawn


def _colour_scale(axes: Axes, low: float, high: float) -> None:
    """The scale as a map of one column; equal values leave nothing to scale."""
    span = high - low or 1.0
    steps = [[low + span * step / 127] for step in range(128)]
    axes.imshow(
        steps,
        cmap=_colours(),
        origin="lower",
        interpolation="none",
        aspect="auto",
        extent=(0, 1, low, low + span),
    )
    axes.set_xticks([])
    axes.yaxis.tick_right()
    for side in axes.spines.values():
        side.set_visible(False)


def _colours() -> Colormap:
    """A colour map of uniform lightness steps, safe for colour vision deficiency; light is high."""
    from matplotlib import colormaps

    return colormaps["cividis"]
