"""Exponents of spectra, against samples of known power laws and plain formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from slm_plugin.errors import NumericalError
from slm_plugin.models.view import DecoderView
from slm_plugin.pruners.layer_sparsity.spectra import (
    BINS,
    PEAK,
    alpha,
    distance,
    hill_exponent,
    median_start,
    peak_start,
    spectrum,
)
from tests.tiny import make_model


def matrix(rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Independent normal entries."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("exponent", [2.0, 3.5])
def test_the_exponent_of_a_pareto_sample_is_found(exponent: float) -> None:
    """Within 5 %, from the median and from a fitted start."""
    uniform = torch.rand(5000, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    sample = ((1 - uniform) ** (-1 / (exponent - 1))).sort().values
    assert hill_exponent(sample, median_start) == pytest.approx(exponent, rel=0.05)
    assert hill_exponent(sample, peak_start) == pytest.approx(exponent, rel=0.05)


@pytest.mark.parametrize("shape", [(12, 30), (30, 12)])
def test_the_spectrum_is_that_of_the_singular_values(shape: tuple[int, int]) -> None:
    """The formula of the paper by numpy, and no change under scaling and rotation."""
    weight = matrix(*shape)
    eigenvalues = np.sort(np.linalg.svd(weight.double().numpy(), compute_uv=False) ** 2)
    assert spectrum(weight).numpy() == pytest.approx(eigenvalues)
    tail = eigenvalues[6:]
    wanted = 1 + len(tail) / np.log(tail / tail[0]).sum()
    assert hill_exponent(spectrum(weight), median_start) == pytest.approx(wanted)
    turned = torch.linalg.qr(matrix(shape[0], shape[0], seed=2)).Q @ weight * 7
    assert hill_exponent(spectrum(turned), median_start) == pytest.approx(wanted, rel=1e-4)


def test_values_of_zero_are_no_part_of_the_spectrum() -> None:
    """A matrix of rank 3 has three."""
    assert len(spectrum(matrix(20, 3) @ matrix(3, 30))) == 3


def test_the_start_near_the_peak_fits_best() -> None:
    """Every candidate by the definition of the distance, with numpy's histogram."""
    values = spectrum(matrix(60, 90))
    counts, edges = np.histogram(np.log10(values.numpy()), bins=BINS)
    peak = 10 ** edges[counts.argmax()]
    candidates = [i for i, v in enumerate(values) if PEAK[0] * peak <= v <= PEAK[1] * peak]
    assert len(candidates) > 1

    def far(start: int) -> float:
        tail = values[start:].numpy()
        exponent = 1 + len(tail) / np.log(tail / tail[0]).sum()
        fitted = 1 - (tail / tail[0]) ** (1 - exponent)
        return float(np.abs(fitted - np.arange(len(tail)) / len(tail)).max())

    assert peak_start(values) == min(candidates, key=far)
    assert distance(values[candidates[0] :]) == pytest.approx(far(candidates[0]))


def test_the_released_lower_bound_lets_in_nearly_all_small_values() -> None:
    """It is a logarithm that is compared with the values themselves: what ours leaves out."""
    values = spectrum(0.05 * matrix(100, 120))
    counts, edges = np.histogram(np.log10(values.numpy()), bins=BINS)
    peak = 10 ** edges[counts.argmax()]
    released = (values >= math.log10(PEAK[0] * peak)) & (values <= PEAK[1] * peak)
    ours = (values >= PEAK[0] * peak) & (values <= PEAK[1] * peak)
    below = int((values < PEAK[0] * peak).sum())
    assert below and int(released.sum()) == int(ours.sum()) + below


def test_the_exponent_depends_on_the_aspect_ratio_alone() -> None:
    """Random matrices have learned nothing; the exponent tells their shapes apart, not layers.

    Within one shape it hardly moves, so between layers of equal shapes the shift is one constant,
    which the scaling over the layers removes.
    """

    def exponents(rows: int, columns: int) -> list[float]:
        return [
            hill_exponent(spectrum(matrix(rows, columns, seed)), median_start) for seed in range(4)
        ]

    square, wide = exponents(96, 96), exponents(96, 384)
    assert min(wide) - max(square) > 5 * max(np.ptp(square), np.ptp(wide))


def test_shares_are_stretched_means_of_the_exponents() -> None:
    """By hand from the weights; without any spread they are equal."""
    view = DecoderView.of(make_model())
    means = [
        np.mean(
            [
                hill_exponent(spectrum(linear.weight.detach()), median_start)
                for linear in view.projections(layer).values()
            ]
        )
        for layer in view.layers
    ]
    low, high = min(means), max(means)
    wanted = [0.6 + 0.8 * (mean - low) / (high - low) for mean in means]
    assert alpha(view, 0.4) == pytest.approx(wanted)
    assert alpha(view, 0.0) == [1.0] * 6
    assert alpha(view, 0.4, peak=True) != pytest.approx(wanted)


def test_a_matrix_without_a_tail_is_named() -> None:
    """All singular values are equal, or all are 0."""
    for value in (torch.eye(48, 32), torch.zeros(48, 32)):
        model = make_model()
        model.model.layers[3].mlp.up_proj.weight.data = value
        with pytest.raises(NumericalError, match="layer 3 has a matrix whose singular values"):
            alpha(DecoderView.of(model), 0.3)
