"""The time model: exact times are recovered, terms are never negative."""

from __future__ import annotations

import random
from collections.abc import Iterable
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_plugin.pruners.hybrid.shapes import Shape, shapes_to_measure
from slm_plugin.pruners.hybrid.time_model import TimeModel, fit
from tests.tiny import SMOLLM2

SHAPES = shapes_to_measure(SMOLLM2, kv_groups=True)
UNSEEN = [Shape(27, 1536, 3), Shape(24, 1384, 2), Shape(30, 1152, 1), Shape(1, 8, 1)]
MODEL = TimeModel(fixed=0.02, per_layer=1e-3, per_kv_group=4e-4, per_channel=2e-6)


def times(shapes: Iterable[Shape], model: TimeModel = MODEL) -> dict[Shape, float]:
    """The formula of the docstring, written out."""
    return {
        s: model.fixed
        + s.layers
        * (model.per_layer + model.per_kv_group * s.kv_groups + model.per_channel * s.mlp_width)
        for s in shapes
    }


@given(
    terms=st.tuples(
        *(st.one_of(st.just(0.0), st.floats(scale * 1e-2, scale)) for scale in (0.1, 0.01, 1e-3)),
        st.floats(1e-8, 1e-5),
    )
)
def test_exact_times_are_recovered(terms: tuple[float, float, float, float]) -> None:
    """Every term, zero or not, from the eight shapes; other shapes are predicted."""
    made = TimeModel(*terms)
    found = fit(times(SHAPES, made))
    assert found.largest < 1e-8
    assert astuple(found.model) == pytest.approx(terms, rel=1e-5, abs=1e-9)
    for shape, seconds in times(UNSEEN, made).items():
        assert found.model.seconds(shape) == pytest.approx(seconds, rel=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_it_is_the_best_fit_that_is_not_negative(seed: int) -> None:
    """With noise as large as the terms: relative least squares, as SciPy's solver has it."""
    shuffled = random.Random(seed)
    measured = {s: t * shuffled.uniform(0.6, 1.4) for s, t in times(SHAPES).items()}
    found = fit(measured)
    assert min(astuple(found.model)) >= 0
    rows = [
        [1 / t, s.layers / t, s.layers * s.kv_groups / t, s.layers * s.mlp_width / t]
        for s, t in measured.items()
    ]
    scale = np.linalg.norm(rows, axis=0)
    _, expected = pytest.importorskip("scipy.optimize").nnls(
        np.array(rows) / scale, np.ones(len(rows))
    )
    error = sum(residual**2 for residual in found.residuals.values()) ** 0.5
    assert error == pytest.approx(expected, rel=1e-6)
    for shape, residual in found.residuals.items():
        assert found.model.seconds(shape) == pytest.approx((1 + residual) * measured[shape])


def test_noise_makes_some_term_zero() -> None:
    """A wider MLP that seems faster costs nothing, and no negative time."""
    measured = times(SHAPES)
    measured = {s: t * (0.7 if s.mlp_width == 1536 else 1.3) for s, t in measured.items()}
    found = fit(measured).model
    assert found.per_channel == 0
    assert found.seconds(Shape(1, 1, 1)) > 0


@pytest.mark.parametrize(
    ("shapes", "told"),
    [
        ([Shape(30, 1536, 3)], {"per_layer"}),
        ([Shape(30, 1536, 3), Shape(20, 1536, 3)], {"fixed", "per_layer"}),
        ([Shape(30, 1536, 3), Shape(30, 928, 3)], {"per_layer", "per_channel"}),
        (
            [Shape(30, 1536, 3), Shape(20, 1536, 3), Shape(30, 928, 3)],
            {"fixed", "per_layer", "per_channel"},
        ),
    ],
)
def test_fewer_shapes_than_terms(shapes: list[Shape], told: set[str]) -> None:
    """What they do not tell apart is in one term; they themselves are met exactly."""
    found = fit(times(shapes))
    assert found.largest < 1e-9
    terms = zip(
        ("fixed", "per_layer", "per_kv_group", "per_channel"), astuple(found.model), strict=True
    )
    assert {name for name, value in terms if value > 0} == told


@pytest.mark.parametrize("wrong", [{}, {Shape(1, 1, 1): 0.0}, {Shape(1, 1, 1): -1.0}])
def test_nothing_to_fit(wrong: dict[Shape, float]) -> None:
    """No shape, or no time."""
    with pytest.raises(ValueError, match="one shape or more"):
        fit(wrong)
