"""Take all figures of an analysis from a session's calibration set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_plugin.analysis.cosines import CosineSums
from slm_plugin.analysis.observation import observe, token_norms
from slm_plugin.analysis.record import (
    Figures,
    LayerCka,
    LayerCosine,
    LayerNorms,
    Matrix,
    NoiseCka,
    Outlier,
    TokenNorms,
)
from slm_plugin.calibration.captures import Batch
from slm_plugin.errors import CalibrationError
from slm_plugin.lazy import torch
from slm_plugin.progress import track
from slm_plugin.pruners.depth.measures.cka import chance_matrix, cka_matrix, gram

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session

# Their 28 pairs tell how far one estimate scatters.
_NOISE_SETS = 8


def measure(session: Session) -> Figures:
    """Compare the layers of the session's model in its present state.

    All states of one batch are in memory at a time, then one layer of all samples at a time.

    Raises:
        CalibrationError: The session has no calibration set, or fewer than four samples.
        NumericalError: The model produces NaN or infinity, or all samples are alike.
    """
    noise = noise_cka(session)
    batches = session.captured()
    layers = len(session.view.layers)
    cosines = CosineSums(layers + 1, session.view.embedding.embedding_dim)
    norms: dict[str, list[Tensor]] = {"output": [], "update": [], "attention": [], "mlp": []}
    for batch in track(batches, "comparing layers", len(batches)):
        seen = observe(session.view, batch)
        cosines.add(seen.states)
        steps = zip(seen.states[:-1], seen.states[1:], strict=True)
        norms["update"].append(torch.stack([token_norms(new - old) for old, new in steps]))
        norms["output"].append(torch.stack([token_norms(state) for state in seen.states[1:]]))
        norms["attention"].append(seen.attention)
        norms["mlp"].append(seen.mlp)
    grams, unit_grams, outliers = across_samples(batches, layers)
    return Figures(
        cka=_cka(grams),
        cka_unit_tokens=_cka(unit_grams),
        outliers=outliers,
        noise=noise,
        cosine=LayerCosine(
            same_token=_rows(cosines.same_token()[1:, 1:]),
            other_token=_rows(cosines.other_token()[1:, 1:]),
        ),
        block_influence=tuple(cosines.block_influence().tolist()),
        norms=LayerNorms(**{name: _token_norms(parts) for name, parts in norms.items()}),
    )


def noise_cka(session: Session) -> NoiseCka:
    """CKA of independent Gaussian sets in the shape of a layer's output, by both estimators.

    Raises:
        CalibrationError: The session has no calibration set, or fewer than four samples.
    """
    if session.calibration is None:
        raise CalibrationError(
            "an analysis needs calibration data", hint="give the session a calibration set"
        )
    samples, length = session.calibration.shape
    generator = torch.Generator().manual_seed(session.seed)
    shape = (samples, length * session.view.embedding.embedding_dim)
    grams = torch.stack([gram(torch.randn(shape, generator=generator)) for _ in range(_NOISE_SETS)])
    one, other = torch.triu_indices(_NOISE_SETS, _NOISE_SETS, offset=1)
    biased = cka_matrix(grams, "biased")[one, other]
    unbiased = cka_matrix(grams, "unbiased")[one, other]
    return NoiseCka(
        biased=biased.mean().item(), unbiased=unbiased.mean().item(), scatter=unbiased.std().item()
    )


def across_samples(
    batches: Sequence[Batch], layers: int
) -> tuple[Tensor, Tensor, tuple[Outlier, ...]]:
    """What needs all samples of a layer at once, from one layer at a time.

    Args:
        batches: What was captured: the output of a layer is the input of the next.
        layers: How many layers there are.

    Returns:
        Gram matrices of the outputs as they are and with every token's vector at unit length,
        each ``(layers, samples, samples)``, and the outlier of every layer.

    Raises:
        NumericalError: A state is NaN or infinite.
    """
    as_is, unit, outliers = [], [], []
    for layer in track(range(1, layers + 1), "comparing samples", layers):
        states = torch.cat([batch.inputs[layer].cpu() for batch in batches]).float()
        as_is.append(gram(states))
        unit.append(gram(torch.nn.functional.normalize(states, dim=-1)))
        outliers.append(outlier(states))
    return torch.stack(as_is), torch.stack(unit), tuple(outliers)


def outlier(states: Tensor) -> Outlier:
    """The token in which samples differ most: CKA over samples weighs squared deviations.

    Args:
        states: ``(samples, length, hidden)``, not all samples alike.
    """
    squares = (states - states.mean(0)).square().sum(-1, dtype=torch.float64)
    sample, position = divmod(int(squares.argmax()), states.shape[1])
    return Outlier(sample=sample, position=position, share=(squares.max() / squares.sum()).item())


def _cka(grams: Tensor) -> LayerCka:
    chance = chance_matrix(grams)
    return LayerCka(
        biased=_rows(cka_matrix(grams, "biased")),
        unbiased=_rows(cka_matrix(grams, "unbiased")),
        biased_by_chance=_rows(chance),
        # What chance gives a layer with itself is its participation ratio, tr(K)^2 / tr(K^2),
        # over samples - 1.
        directions=tuple((chance.diagonal() * (grams.shape[-1] - 1)).tolist()),
    )


def _token_norms(parts: Sequence[Tensor]) -> tuple[TokenNorms, ...]:
    """Mean and (lower) median over tokens of ``(layers, tokens)`` in parts."""
    norms = torch.cat(list(parts), dim=1)
    means, medians = norms.mean(1).tolist(), norms.median(1).values.tolist()
    return tuple(TokenNorms(mean=a, median=b) for a, b in zip(means, medians, strict=True))


def _rows(matrix: Tensor) -> Matrix:
    return tuple(tuple(row) for row in matrix.tolist())
