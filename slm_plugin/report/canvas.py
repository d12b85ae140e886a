"""Common canvas of all plots: one style, one width, reproducible output."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from xml.sax.saxutils import quoteattr

from slm_plugin import extras

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Inches; 72 points each, so that a 9 point label is 12 px high on a sheet shown 900 px wide.
WIDTH = 9.375

# Okabe and Ito's palette: distinguishable with colour vision deficiency and in greyscale print.
BLUE, SKY, VERMILION = "#0072B2", "#9CCBEA", "#C44E00"
INK, MUTED, GRID, PALE = "#1f2933", "#5b6770", "#e3e7eb", "#c9d0d6"

_STYLE: dict[str, Any] = {
    "svg.hashsalt": "slm-plugin",
    "svg.fonttype": "none",
    "text.parse_math": False,
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
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
}


@dataclass(slots=True)
class Sheet:
    """A figure under construction; `svg` is set when its `sheet` block ends."""

    figure: Figure
    svg: str = ""


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
        drawn = Sheet(Figure(figsize=(WIDTH, height), layout="constrained"))
        yield drawn
        buffer = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        FigureCanvasSVG(drawn.figure).print_svg(buffer, metadata=nothing)
        drawn.svg = _inline(buffer.getvalue(), name, description)


def whole_numbers(axis: Axis) -> None:
    """Ticks at whole numbers only, for layers."""
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(9, integer=True, steps=[1, 2, 5, 10]))


def short(text: str, length: int) -> str:
    """The text, ended by an ellipsis where it is longer."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def _inline(text: str, name: str, description: str) -> str:
    """Convert an SVG file for inline use: no prolog, no fixed size, prefixed ids."""
    opening, rest = text[text.index("<svg") :].split(">", 1)
    box = re.search(r'viewBox="[^"]*"', opening)
    rest = re.sub(r'\bid="', f'id="{name}-', rest)
    rest = rest.replace("url(#", f"url(#{name}-").replace('href="#', f'href="#{name}-')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'{box[0] if box else ""} role="img" aria-label={quoteattr(description)}>'
        f"{rest.strip()}"
    )
