"""Ridge least squares from sums gives what least squares over all tokens at once gives."""

from __future__ import annotations

import pytest
import torch

from slm_plugin.errors import CalibrationError, NumericalError
from slm_plugin.restoration.least_squares import RIDGES, Fit, Regression
from tests.recovery.pruned import ridge_oracle

SAMPLES, LENGTH, FEATURES, HIDDEN = 12, 7, 9, 5


def _data(noise: float, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features, a lack that a planted map explains but for noise, and the planted map."""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(SAMPLES, LENGTH, FEATURES, generator=generator)
    planted = torch.randn(FEATURES, HIDDEN, generator=generator)
    spoilt = noise * torch.randn(SAMPLES, LENGTH, HIDDEN, generator=generator)
    return features, features @ planted + spoilt, planted


def _fit(features: torch.Tensor, lack: torch.Tensor, batch: int = 4) -> Fit:
    regression = Regression("layer 3")
    for start in range(0, len(features), batch):
        part = slice(start, start + batch)
        regression.add(start, features[part], lack[part], lack[part] + 1)
    return regression.solve()


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.flatten(0, 1).double()


@pytest.mark.parametrize("noise", [0.3, 3.0, 10.0])
@pytest.mark.parametrize("batch", [1, 4, 12])
def test_sums_over_batches_give_the_solution_over_all_tokens(noise: float, batch: int) -> None:
    """Ridge, held-out errors and solution are those of a brute-force search, whatever batches."""
    features, lack, _ = _data(noise)
    held_out = torch.arange(SAMPLES) % 5 == 0
    target = _flat(lack[held_out] + 1)
    errors = {float("inf"): float(_flat(lack[held_out]).norm() / target.norm())}
    for ridge in RIDGES:
        change = ridge_oracle(_flat(features[~held_out]), _flat(lack[~held_out]), ridge)
        left = _flat(lack[held_out]) - _flat(features[held_out]) @ change
        errors[ridge] = float(left.norm() / target.norm())
    best = min(errors, key=errors.__getitem__)
    fit = _fit(features, lack, batch)
    assert fit.ridge == best
    assert fit.before == pytest.approx(errors[float("inf")])
    assert fit.after == pytest.approx(errors[best])
    assert fit.change is not None
    expected = ridge_oracle(_flat(features[~held_out]), _flat(lack[~held_out]), best)
    torch.testing.assert_close(fit.change, expected, rtol=1e-8, atol=1e-10)


def test_a_planted_map_is_recovered() -> None:
    """Without noise the weakest ridge is chosen and the map comes back."""
    features, lack, planted = _data(0.0)
    fit = _fit(features, lack)
    assert fit.ridge == min(RIDGES)
    assert fit.change is not None
    torch.testing.assert_close(fit.change, planted.double(), rtol=1e-3, atol=1e-3)
    assert fit.after < 1e-3 * fit.before


def test_noise_is_not_fitted() -> None:
    """What held-out samples do not bear out changes nothing: the infinite ridge."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(6, 2, 40, generator=generator)
    fit = _fit(features, torch.randn(6, 2, HIDDEN, generator=generator))
    assert fit.change is None and fit.ridge == float("inf") and fit.before == fit.after
    assert "left as it is" in fit.describe()


def test_nothing_lacks_and_nothing_is_seen() -> None:
    """Zero lack, and features that are all zero, are left as they are."""
    features, lack, _ = _data(0.0)
    assert _fit(features, torch.zeros_like(lack)).change is None
    assert _fit(torch.zeros_like(features), lack).change is None


def test_only_sums_are_kept() -> None:
    """What is held does not grow with the tokens that went in."""
    features, lack, _ = _data(1.0)
    regression, sizes = Regression("here"), []
    for start in range(0, 10 * SAMPLES, SAMPLES):
        regression.add(start, features, lack, lack)
        held = [vars(sums) for sums in (regression._fitted, regression._held_out)]
        tensors = [v for sums in held for v in sums.values() if isinstance(v, torch.Tensor)]
        assert all(tensor.dtype == torch.float64 for tensor in tensors)
        sizes.append(sum(tensor.numel() for tensor in tensors))
    assert set(sizes) == {2 * (FEATURES * FEATURES + FEATURES * HIDDEN)}


def test_one_sample_is_too_few() -> None:
    """Nothing would be left to fit on, and the message says what to raise."""
    features, lack, _ = _data(1.0)
    with pytest.raises(CalibrationError, match=r"layer 3 .* fewer than 2 .*samples"):
        _fit(features[:1], lack[:1])
    assert _fit(features[:2], lack[:2]).before > 0


@pytest.mark.parametrize("where", ["features", "lack"])
@pytest.mark.parametrize("sample", [0, 1])
def test_nan_is_refused(where: str, sample: int) -> None:
    """In samples that are held out and in others, in what is seen and in what is wanted."""
    features, lack, _ = _data(1.0)
    (features if where == "features" else lack)[sample, 2, 3] = float("nan")
    with pytest.raises(NumericalError, match="layer 3 are NaN or infinite"):
        _fit(features, lack)
