"""Common canvas of all plots: one style, one width, reproducible output."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

from slm_plugin import extras

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

Look = dict[str, Any]

# Inches; 72 points each, so that a 9 point label is 12 px high on a sheet shown 900 px wide.
WIDTH = 9.375

# Okabe and Ito's palette: distinguishable with colour vision deficiency and in greyscale print.
BLUE, SKY, ORANGE, VERMILION = "#0072B2", "#9CCBEA", "#E69F00", "#C44E00"
INK, MUTED, GRID, PALE = "#1f2933", "#5b6770", "#e3e7eb", "#c9d0d6"

_STYLE: Look = {
    "svg.hashsalt": "slm-plugin",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "axes.edgecolor": PALE,
    "axes.labelcolor": MUTED,
    "text.color": INK,
    "xtick.color": PALE,
    "ytick.color": PALE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "hatch.linewidth": 0.6,
}


class Sheet:
    """A figure under construction; `svg` is set when its `sheet` block ends."""

    def __init__(self, figure: Figure, height: float) -> None:
        self.figure = figure
        self.height = height
        self.svg = ""

    def axes(
        self, left: float, top: float, right: float, bottom: float, below: Axes | None = None
    ) -> Axes:
        """Axes whose four margins to the edges of the sheet are given in inches.

        With ``below`` they share the horizontal axis of others.
        """
        size = (WIDTH - left - right, self.height - top - bottom)
        box = (left / WIDTH, bottom / self.height, size[0] / WIDTH, size[1] / self.height)
        axes: Axes = self.figure.add_axes(box, sharex=below)
        return axes


def whole_numbers(axis: Axis, most: int = 9) -> None:
    """Ticks at whole numbers only, for layers and trials."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(most, integer=True, steps=[1, 2, 5, 10]))


def plain_decades(axis: Axis) -> None:
    """Numbers written out at 1, 2 and 5 of each decade: powers would need mathematical text.

    An axis that spans little has evenly spaced numbers instead, as 1, 2 and 5 would leave it bare.
    """
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    low, high = axis.get_view_interval()
    if low > 0 and high < 5 * low:
        axis.set_major_locator(MaxNLocator(6))
        axis.set_minor_locator(NullLocator())
    else:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


@contextmanager
def sheet(name: str, height: float, description: str) -> Iterator[Sheet]:
    """Yield an empty sheet in the common style, and convert it to SVG at the end.

    Args:
        name: Prefix of every id, so that one page can have several plots.
        height: Inches.
        description: Alternative text for screen readers.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    extras.require("report", "drawing the pictures of the report")
    from matplotlib import style
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with style.context(["default", _STYLE]), warnings.catch_warnings():
        # Keep text as text, so that the browser supplies glyphs missing in matplotlib's font.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        drawn = Sheet(Figure(figsize=(WIDTH, height)), height)
        yield drawn
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(drawn.figure).print_svg(buffer, metadata=nothing)
        drawn.svg = _inline(buffer.getvalue(), name, description)


def _inline(text: str, name: str, description: str) -> str:
    """Convert an SVG file for inline use: no prolog, no fixed size, prefixed ids."""
    body = text[text.index("<svg") :]
    opening, rest = body.split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = rest.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{box[0] if box else ""} role="img" aria-label={quoteattr(description)}>'
        f"{rest.strip()}"
    )
