"""An analysis as one self-contained HTML page that says how to read each of its pictures."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean

from slm_plugin.analysis.heatmaps import heatmaps
from slm_plugin.analysis.record import Analysis, Figures, LayerCka, Matrix
from slm_plugin.files import write_text
from slm_plugin.report.environment import environment
from slm_plugin.report.numbers import number
from slm_plugin.report.page import picture
from slm_plugin.report.table import Cell, Column, Row, Table
from slm_plugin.report.writer import to_json


def render_analysis(analysis: Analysis) -> str:
    """An analysis as an HTML page.

    Returns:
        HTML. Where matplotlib is missing the page says so in the place of every picture.
    """
    figures = analysis.figures
    cka, influence = figures.cka, figures.block_influence
    layers = range(len(influence))
    template = environment().get_template("analysis.html.j2")
    return template.render(
        analysis=analysis,
        noise=figures.noise,
        features=analysis.calibration.length * analysis.dimensions.hidden_size,
        similarities=similarity_table(
            {
                "CKA, biased": cka.biased,
                "what chance alone gives it": cka.biased_by_chance,
                "CKA, unbiased": cka.unbiased,
                "CKA, unbiased, tokens at unit length": figures.cka_unit_tokens.unbiased,
                "cosine, same token": figures.cosine.same_token,
                "cosine, different tokens": figures.cosine.other_token,
            }
        ),
        layers=layer_table(figures),
        directions=cka.directions,
        outliers=figures.outliers,
        narrowest=min(layers, key=cka.directions.__getitem__),
        influence=influence,
        least=sorted(layers, key=influence.__getitem__)[:3],
        cka_maps=picture(
            "CKA between layers",
            "Both estimators and the floor of the biased one, on one scale.",
            heatmaps,
            _cka_maps(cka),
            "cka",
        ),
        unit_maps=picture(
            "CKA between layers, every token's vector at unit length",
            "The same three maps when no token outweighs another.",
            heatmaps,
            _cka_maps(figures.cka_unit_tokens),
            "cka-unit",
        ),
        cosine_maps=picture(
            "Cosine between layers",
            "Mean cosine of two tokens' vectors along the hidden axis, on one scale.",
            heatmaps,
            {
                "same token in both layers": figures.cosine.same_token,
                "different tokens": figures.cosine.other_token,
            },
            "cosine",
        ),
    )


def similarity_table(matrices: dict[str, Matrix]) -> Table:
    """Each matrix with at least one pair of layers in four figures, its diagonal left out."""
    heads = ("consecutive layers, mean", "all pairs, mean", "lowest pair", "layers")
    rows = []
    for name, matrix in matrices.items():
        count = len(matrix)
        pairs = {(i, j): matrix[i][j] for i in range(count) for j in range(i + 1, count)}
        if pairs:
            low, high = min(pairs, key=pairs.__getitem__)
            steps = [matrix[i][i + 1] for i in range(count - 1)]
            figures = (fmean(steps), fmean(pairs.values()), pairs[low, high])
            shown = (name, *(number(value, 4) for value in figures), f"{low}, {high}")
            rows.append(Row(tuple(map(Cell, shown))))
    return Table((Column("figure", words=True), *map(Column, heads)), tuple(rows))


def layer_table(figures: Figures) -> Table:
    """The figures of single layers."""
    norms = figures.norms
    columns = {
        "block influence": [number(value, 4) for value in figures.block_influence],
        "norm of the output, median": [number(one.median) for one in norms.output],
        "norm of the output, mean": [number(one.mean) for one in norms.output],
        "attention adds, median": [number(one.median) for one in norms.attention],
        "MLP adds, median": [number(one.median) for one in norms.mlp],
        "directions": [number(value, 1) for value in figures.cka.directions],
        "directions, tokens at unit length": [
            number(value, 1) for value in figures.cka_unit_tokens.directions
        ],
    }
    rows = (
        Row(tuple(map(Cell, (str(layer), *values))))
        for layer, values in enumerate(zip(*columns.values(), strict=True))
    )
    return Table((Column("layer", words=True), *map(Column, columns)), tuple(rows))


def _cka_maps(cka: LayerCka) -> dict[str, Matrix]:
    return {
        "biased": cka.biased,
        "biased, by chance alone": cka.biased_by_chance,
        "unbiased": cka.unbiased,
    }


def write_analysis(analysis: Analysis, folder: Path) -> None:
    """Write ``analysis.json`` and ``analysis.html``; each appears whole or not at all.

    Raises:
        OutputError: A file cannot be written.
    """
    write_text(folder / "analysis.json", to_json(analysis))
    write_text(folder / "analysis.html", render_analysis(analysis))
