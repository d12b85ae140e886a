"""Number formatting, shared by the page, the card and the terminal."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich.filesize import decimal

MINUS = "\N{MINUS SIGN}"
TIMES = "\N{MULTIPLICATION SIGN}"
BYTE_UNITS = ("B", "bytes")


def places(values: Iterable[float]) -> int:
    """Decimal places that give the largest value about four significant digits."""
    finite = [abs(value) for value in values if math.isfinite(value)]
    largest = max(finite, default=0.0)
    if all(value == round(value) for value in finite):
        return 0
    if largest < 1e-3:
        return 6
    return next((p for limit, p in ((1, 4), (10, 3), (100, 2), (1000, 1)) if largest < limit), 0)


def number(value: float, decimals: int | None = None, *, signed: bool = False) -> str:
    """A number with thousands separators and a real minus sign.

    Args:
        value: Any float, including infinity and NaN.
        decimals: Decimal places; by default from `places`.
        signed: Write the plus sign too.
    """
    if math.isnan(value):
        return "NaN"
    sign = MINUS if value < 0 else "+" if signed and value > 0 else ""
    if math.isinf(value):
        return f"{sign}\N{INFINITY}"
    digits = places([value]) if decimals is None else decimals
    if 0 < abs(value) < 0.5 * 10**-digits:
        return f"{sign}{abs(value):.1e}"
    return f"{sign}{abs(value):,.{digits}f}"


def quantity(value: float, unit: str, decimals: int | None = None, *, signed: bool = False) -> str:
    """A number with its unit; bytes get a decimal prefix."""
    if unit in BYTE_UNITS and math.isfinite(value):
        sign = "+" if signed and value > 0 else MINUS if value < 0 else ""
        return sign + decimal(round(abs(value)))
    return f"{number(value, decimals, signed=signed)} {unit}".rstrip()


def count(parameters: int) -> str:
    """An abbreviated parameter count, as ``134.5 M``."""
    for scale, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= scale:
            return f"{parameters / scale:.{2 if letter == 'B' else 1}f} {letter}"
    return str(parameters)


def plural(how_many: int, noun: str) -> str:
    """``1 layer``, ``3 layers``."""
    return f"{how_many:,} {noun}" if how_many == 1 else f"{how_many:,} {noun}s"


def duration(seconds: float) -> str:
    """A time span in its two largest units, as ``3 min 20 s``."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def change(before: float, after: float) -> str:
    """Relative change in percent, with one decimal; empty where it is undefined."""
    if before == 0 or not math.isfinite(before) or not math.isfinite(after):
        return ""
    return f"{number(100 * (after - before) / abs(before), 1, signed=True)}%"


def ratio(value: float) -> str:
    """After divided by before, with a multiplication sign."""
    return f"{TIMES}{number(value, 3 if abs(value) < 100 else 0)}"


def spans(indices: Iterable[int]) -> str:
    """Indices, with consecutive ones joined by an en dash."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ", ".join(f"{a}" if a == b else f"{a}\N{EN DASH}{b}" for a, b in runs)
