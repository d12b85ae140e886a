"""An analysis as one self-contained HTML page that says how to read each of its pictures."""

from __future__ import annotations

from dataclasses import dataclass

from slm_plugin.analysis.record import Analysis, Matrix, TokenNorms
from slm_plugin.report import pictures
from slm_plugin.report.environment import environment
from slm_plugin.report.page import picture


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
    cka, cosine, influence = figures.cka, figures.cosine, figures.block_influence
    template = environment().get_template("analysis.html.j2")
    return template.render(
        analysis=analysis,
        cka=cka,
        features=analysis.calibration.length * analysis.dimensions.hidden_size,
        similarities=summaries(
            {
                "CKA, biased": cka.biased,
                "what chance alone gives it": cka.biased_by_chance,
                "CKA, unbiased": cka.unbiased,
                "cosine, same token": cosine.same_token,
                "cosine, other tokens": cosine.other_token,
            }
        ),
        least=sorted(range(len(influence)), key=influence.__getitem__)[:3],
        influence=influence,
        **_pictures(analysis),
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


def _pictures(analysis: Analysis) -> dict[str, object]:
    figures = analysis.figures
    cka, cosine, norms = figures.cka, figures.cosine, figures.norms
    return {
        "cka_maps": picture(
            "CKA between layers",
            "Both estimators and the floor of the biased one, on one scale.",
            lambda: pictures.heatmaps(
                {
                    "biased": cka.biased,
                    "biased, by chance alone": cka.biased_by_chance,
                    "unbiased": cka.unbiased,
                },
                "cka",
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
            lambda: pictures.norms(
                {
                    "output, median": [one.median for one in norms.output],
                    "output, mean": [one.mean for one in norms.output],
                    "attention adds, median": _medians(norms.attention),
                    "MLP adds, median": _medians(norms.mlp),
                }
            ),
        ),
    }


def _medians(tokens: tuple[TokenNorms, ...]) -> list[float]:
    return [one.median for one in tokens]
