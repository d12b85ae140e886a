"""Plots of one figure per layer: block influence and norms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slm_plugin.report.pictures import canvas

_LINES: tuple[canvas.Look, ...] = (
    {"color": canvas.INK, "lw": 1.6, "marker": "o"},
    {"color": canvas.MUTED, "lw": 1.2, "marker": "s", "ls": (0, (4, 2))},
    {"color": canvas.BLUE, "lw": 1.4, "marker": "^"},
    {"color": canvas.VERMILION, "lw": 1.4, "marker": "v"},
)


def influences(values: Sequence[float], name: str = "influences") -> str:
    """Block influence of every layer, a bar each.

    Args:
        values: One number per layer.
        name: Prefix of the ids; every bar has the id ``<name>-layer-<index>``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with canvas.sheet(name, 2.5, f"Block influence of {len(values)} layers") as sheet:
        axes = sheet.axes(0.75, 0.2, 0.2, 0.5)
        for layer, bar in enumerate(axes.bar(range(len(values)), values, 0.72, color=canvas.BLUE)):
            bar.set_gid(f"layer-{layer}")
        axes.set(xlim=(-0.7, len(values) - 0.3), xlabel="layer", ylabel="block influence")
        canvas.whole_numbers(axes.xaxis)
        axes.grid(axis="y")
    return sheet.svg


def profiles(values: Mapping[str, Sequence[float]], name: str, label: str) -> str:
    """Lines over the layers, on a logarithmic scale; a 0 leaves a gap.

    Args:
        values: At most four lines by label, one number per layer each.
        name: Prefix of the ids; every line has the id ``<name>-line-<number>``, from 1.
        label: Label of the vertical axis.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    with canvas.sheet(name, 3.1, f"{label} over the layers: {', '.join(values)}") as sheet:
        axes = sheet.axes(0.75, 0.4, 0.2, 0.5)
        drawn = zip(values.items(), _LINES, strict=False)
        for number, ((line, numbers), look) in enumerate(drawn, start=1):
            shown = [value if value > 0 else float("nan") for value in numbers]
            axes.plot(range(len(shown)), shown, label=line, ms=3.5, gid=f"line-{number}", **look)
        axes.set(yscale="log", xlabel="layer", ylabel=label)
        canvas.plain_decades(axes.yaxis)
        canvas.whole_numbers(axes.xaxis)
        axes.grid(axis="y")
        axes.margins(x=0.02)
        axes.legend(
            loc="lower left",
            bbox_to_anchor=(-0.01, 1.0),
            ncols=len(values),
            borderaxespad=0.2,
            columnspacing=1.6,
        )
    return sheet.svg
