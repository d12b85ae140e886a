"""Heatmaps of pairwise layer measures, side by side on one scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from slm_plugin.report import canvas

Matrix = Sequence[Sequence[float]]


def heatmaps(maps: Mapping[str, Matrix], name: str) -> str:
    """Square maps on one colour scale, from the lowest value of all of them to the highest.

    Args:
        maps: Values by title, ``(layers, layers)`` each; row and column 0 are lowest and leftmost.
        name: Prefix of the ids; every map has the id ``<name>-map-<number>``, from 1.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    values = [value for matrix in maps.values() for row in matrix for value in row]
    with canvas.sheet(name, 3.4, f"Heatmaps over layers: {', '.join(maps)}") as sheet:
        row = sheet.figure.subplots(1, len(maps), squeeze=False)[0]
        for number, (axes, (title, matrix)) in enumerate(
            zip(row, maps.items(), strict=True), start=1
        ):
            # Cividis has uniform lightness steps and is safe for colour vision deficiency.
            drawn = axes.imshow(
                matrix,
                cmap="cividis",
                vmin=min(values),
                vmax=max(values),
                origin="lower",
                interpolation="none",
                gid=f"map-{number}",
            )
            axes.set(title=title, xlabel="layer", ylabel="layer" if number == 1 else "")
            canvas.whole_numbers(axes.xaxis)
            canvas.whole_numbers(axes.yaxis)
        sheet.figure.colorbar(drawn, ax=row, shrink=0.8)
    return sheet.svg
