"""CKA against its definitions, written out, and the properties that papers state of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from slm_plugin.errors import CalibrationError, NumericalError
from slm_plugin.pruners.depth.measures.cka import (
    chance_matrix,
    cka_matrix,
    gram,
    gram_cka,
)

Cka = Callable[[Tensor, Tensor], Tensor]


def cka_biased(x: Tensor, y: Tensor) -> Tensor:
    """CKA of two sets of features, by the usual estimator."""
    return gram_cka(gram(x), gram(y), "biased")


def cka_unbiased(x: Tensor, y: Tensor) -> Tensor:
    """CKA of two sets of features, by the unbiased estimator."""
    return gram_cka(gram(x), gram(y), "unbiased")


BOTH = pytest.mark.parametrize("cka", [cka_biased, cka_unbiased])


def features(samples: int, size: int, seed: int = 0) -> Tensor:
    """Gaussian features in float64."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, size, generator=generator, dtype=torch.float64)


def related(samples: int, size: int) -> tuple[Tensor, Tensor]:
    """Features, and a noisy linear map of them."""
    x = features(samples, size)
    return x, x @ features(size, size + 2, seed=1) + 3 * features(samples, size + 2, seed=2)


def kernel(x: Tensor) -> NDArray[np.float64]:
    """Linear Gram matrix, not centred."""
    array = x.numpy()
    return np.asarray(array @ array.T)


def explicit_biased(x: Tensor, y: Tensor) -> float:
    """tr(KHLH) with the centring matrix H written out."""
    h = np.eye(len(x)) - 1 / len(x)

    def hsic(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
        return float(np.trace(a @ h @ b @ h))

    a, b = kernel(x), kernel(y)
    return hsic(a, b) / math.sqrt(hsic(a, a) * hsic(b, b))


def tuple_hsic(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    """Unbiased HSIC as the U-statistic it is: means over tuples of different samples."""

    def mean(terms: list[float]) -> float:
        return sum(terms) / len(terms)

    n = range(len(a))
    same = mean([a[i, j] * b[i, j] for i, j in itertools.permutations(n, 2)])
    apart = mean([a[i, j] * b[q, r] for i, j, q, r in itertools.permutations(n, 4)])
    chain = mean([a[i, j] * b[i, q] for i, j, q in itertools.permutations(n, 3)])
    return same + apart - 2 * chain


def test_the_biased_estimator_is_the_centring_matrix_formula() -> None:
    """tr(KHLH), normalised, on Grams that were never centred."""
    x, y = related(7, 5)
    x, y = x + 4, y - 9
    assert cka_biased(x, y).item() == pytest.approx(explicit_biased(x, y), rel=1e-10)


@pytest.mark.parametrize("samples", [4, 5, 6])
def test_the_unbiased_estimator_is_the_u_statistic(samples: int) -> None:
    """Sums over all pairs, triples and quadruples of different samples, one by one."""
    x, y = related(samples, 3)
    a, b = kernel(x + 2), kernel(y)
    expected = tuple_hsic(a, b) / math.sqrt(tuple_hsic(a, a) * tuple_hsic(b, b))
    assert cka_unbiased(x + 2, y).item() == pytest.approx(expected, rel=1e-10)


@BOTH
def test_features_are_alike_to_themselves(cka: Cka) -> None:
    """CKA(X, X) is 1, also for features of more than two axes."""
    x = features(6, 12)
    assert cka(x, x).item() == pytest.approx(1, abs=1e-12)
    assert cka(x, x.reshape(6, 3, 4)).item() == pytest.approx(1, abs=1e-12)


@BOTH
def test_rotations_scales_and_shifts_leave_it_as_it_is(cka: Cka) -> None:
    """Orthogonal maps from the right, isotropic scaling and a common offset do not count."""
    x, y = related(8, 5)
    rotation = torch.linalg.qr(features(5, 5, seed=3))[0]
    before = cka(x, y)
    assert 0.1 < before < 0.99
    torch.testing.assert_close(cka(-0.03 * x @ rotation + 7, y), before)
    stretched = x * torch.tensor([1.0, 1, 1, 1, 9], dtype=torch.float64)
    assert abs(cka(stretched, y) - before) > 1e-3


def test_only_the_biased_estimator_takes_noise_for_likeness() -> None:
    """Independent features: biased CKA goes to 1 as they outnumber the samples, unbiased stays."""
    biased, unbiased = [], []
    for size in (8, 128, 8192):
        pairs = [(features(16, size, 2 * s), features(16, size, 2 * s + 1)) for s in range(12)]
        biased.append(float(np.mean([cka_biased(x, y) for x, y in pairs])))
        unbiased.append(float(np.mean([cka_unbiased(x, y) for x, y in pairs])))
    assert biased == sorted(biased) and biased[-1] > 0.99
    assert max(map(abs, unbiased)) < 0.1


@pytest.mark.parametrize("size", [3, 40])
def test_chance_is_the_mean_over_all_pairings(size: int) -> None:
    """24 orders of four samples: their mean biased CKA is the closed form, the unbiased one 0."""
    x, y = related(4, size)
    orders = [list(order) for order in itertools.permutations(range(4))]
    mean = np.mean([explicit_biased(x, y[order]) for order in orders])
    chance = chance_matrix(torch.stack([gram(x), gram(y)]))
    assert chance[0, 1].item() == pytest.approx(mean, rel=1e-9)
    assert np.mean([cka_unbiased(x, y[order]) for order in orders]) == pytest.approx(0, abs=1e-12)


def test_a_matrix_holds_the_cka_of_every_pair() -> None:
    """Symmetric, 1 on the diagonal, and each entry that of its pair."""
    sets = [features(6, 4, seed) for seed in range(3)]
    grams = torch.stack([gram(x) for x in sets])
    for estimator, cka in (("biased", cka_biased), ("unbiased", cka_unbiased)):
        matrix = cka_matrix(grams, estimator)  # type: ignore[arg-type]
        for i, j in itertools.product(range(3), repeat=2):
            torch.testing.assert_close(matrix[i, j], cka(sets[i], sets[j]))
        torch.testing.assert_close(gram_cka(grams[0], grams[2], estimator), matrix[0, 2])


def test_long_features_are_taken_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Gram of features cut into chunks is the Gram of the whole, inputs left as they are."""
    x = features(5, 23)
    before = x.clone()
    whole = gram(x)
    monkeypatch.setattr("slm_plugin.pruners.depth.measures.cka._CHUNK", 7)
    torch.testing.assert_close(gram(x), whole)
    assert torch.equal(x, before)


def test_a_large_common_offset_costs_no_digits() -> None:
    """Hidden states share a part far larger than their differences."""
    x, y = related(6, 5)
    torch.testing.assert_close(
        cka_unbiased(x + 1e6, y), cka_unbiased(x, y), rtol=1e-8, atol=0, check_dtype=False
    )


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_is_an_error(cka: Cka, bad: float) -> None:
    """A criterion that is NaN would lose every comparison in silence."""
    x, y = related(6, 5)
    x[2, 3] = bad
    with pytest.raises(NumericalError, match="NaN or infinite"):
        cka(x, y)


@BOTH
def test_samples_that_are_all_alike_have_no_cka(cka: Cka) -> None:
    """0/0 is said in words."""
    with pytest.raises(NumericalError, match="same features"):
        cka(torch.ones(5, 3), features(5, 3))


def test_three_samples_are_too_few_for_the_unbiased_estimator() -> None:
    """Its divisor is samples - 3."""
    with pytest.raises(CalibrationError, match="needs 4 samples or more; there are 3"):
        cka_unbiased(features(3, 5), features(3, 5, seed=1))
    assert 0 < cka_biased(features(3, 5), features(3, 5, seed=1)) <= 1
