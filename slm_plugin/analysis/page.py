"""An analysis as one self-contained HTML page that says how to read each of its pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from slm_plugin.analysis.record import Analysis, Figures, LayerCka, Matrix
from slm_plugin.files import write_text
from slm_plugin.report import pictures
from slm_plugin.report.environment import environment
from slm_plugin.report.page import Picture, picture
from slm_plugin.report.writer import to_json


@dataclass(frozen=True, slots=True)
class Summary:
    """What a heatmap comes to, its diagonal left out.

    Attributes:
        name: The figure.
        neighbours: Mean over consecutive layers.
        pairs: Mean over all pairs of layers.
        lowest: The least of all pairs.
        between: The two layers that have it.
    """

    name: str
    neighbours: float
    pairs: float
    lowest: float
    between: tuple[int, int]


def render_analysis(analysis: Analysis) -> str:
    """An analysis as an HTML page.

    Returns:
        HTML. Where matplotlib is missing the page says so in the place of every picture.
    """
    figures = analysis.figures
    cka, influence = figures.cka, figures.block_influence
    template = environment().get_template("analysis.html.j2")
    return template.render(
        analysis=analysis,
        noise=figures.noise,
        features=analysis.calibration.length * analysis.dimensions.hidden_size,
        similarities=summaries(
            {
                "CKA, biased": cka.biased,
                "what chance alone gives it": cka.biased_by_chance,
                "CKA, unbiased": cka.unbiased,
                "CKA, unbiased, tokens at unit length": figures.cka_unit_tokens.unbiased,
                "cosine, same token": figures.cosine.same_token,
                "cosine, different tokens": figures.cosine.other_token,
            }
        ),
        directions=cka.directions,
        outliers=figures.outliers,
        narrowest=min(range(len(influence)), key=cka.directions.__getitem__),
        influence=influence,
        least=sorted(range(len(influence)), key=influence.__getitem__)[:3],
        **_pictures(figures),
    )


def summaries(matrices: dict[str, Matrix]) -> list[Summary]:
    """The summary of each matrix that has at least one pair of layers."""
    found = []
    for name, matrix in matrices.items():
        count = len(matrix)
        pairs = {(i, j): matrix[i][j] for i in range(count) for j in range(i + 1, count)}
        if pairs:
            steps = [matrix[i][i + 1] for i in range(count - 1)]
            between = min(pairs, key=pairs.__getitem__)
            mean = sum(pairs.values()) / len(pairs)
            found.append(Summary(name, sum(steps) / len(steps), mean, pairs[between], between))
    return found


def _pictures(figures: Figures) -> dict[str, Picture | None]:
    cka, unit, cosine, norms = figures.cka, figures.cka_unit_tokens, figures.cosine, figures.norms
    return {
        "cka_maps": picture(
            "CKA between layers",
            "Both estimators and the floor of the biased one, on one scale.",
            lambda: pictures.heatmaps(_cka_maps(cka), "cka"),
        ),
        "unit_maps": picture(
            "CKA between layers, every token's vector at unit length",
            "The same three maps when no token outweighs another.",
            lambda: pictures.heatmaps(_cka_maps(unit), "cka-unit"),
        ),
        "direction_lines": picture(
            "Directions that decide CKA",
            "Effective number of directions in which samples differ behind every layer.",
            lambda: pictures.profiles(
                {"as they are": cka.directions, "tokens at unit length": unit.directions},
                "directions",
                "effective directions",
            ),
        ),
        "cosine_maps": picture(
            "Cosine between layers",
            "Mean cosine of two tokens' vectors along the hidden axis, on one scale.",
            lambda: pictures.heatmaps(
                {
                    "same token in both layers": cosine.same_token,
                    "different tokens": cosine.other_token,
                },
                "cosine",
            ),
        ),
        "influence_bars": picture(
            "Block influence",
            "One minus the mean cosine of a layer's input and output, token by token.",
            lambda: pictures.influences(figures.block_influence),
        ),
        "norm_lines": picture(
            "Norms",
            "Of the residual stream behind every layer, and of what the two blocks add to it.",
            lambda: pictures.profiles(
                {
                    "output, median": [one.median for one in norms.output],
                    "output, mean": [one.mean for one in norms.output],
                    "attention adds, median": [one.median for one in norms.attention],
                    "MLP adds, median": [one.median for one in norms.mlp],
                },
                "norms",
                "norm of a token's vector",
            ),
        ),
    }


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
