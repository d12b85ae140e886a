"""Relative sparsities by what layers compute: redundancy, influence, outliers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from slm_plugin.pruners.layer_sparsity.outliers import OUTLIER, outlier_share, owl
from slm_plugin.pruners.layer_sparsity.redundancy import (
    influence,
    layer_redundancy,
    softmax_shares,
)
from slm_plugin.session import Session
from tests.tiny import make_model, random_tokens

TOKENS = random_tokens(4, 10)


def session_of(silent: int | None = None) -> Session:
    """A tiny model; one layer of it may be the identity."""
    model = make_model()
    if silent is not None:
        layer = model.model.layers[silent]
        with torch.no_grad():
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    return Session(model, calibration=TOKENS, batch_tokens=20)


def cosines(session: Session) -> list[float]:
    """Mean cosine of every layer's input and output, by hooks on the model's own pass."""
    seen: list[list[torch.Tensor]] = []
    hooks = [
        layer.register_forward_hook(
            lambda _, given, output: seen.append(
                [given[0], output[0] if isinstance(output, tuple) else output]
            )
        )
        for layer in session.view.layers
    ]
    with torch.no_grad():
        session.model(TOKENS)
    for hook in hooks:
        hook.remove()
    return [float(torch.cosine_similarity(*pair, dim=-1).mean()) for pair in seen]


def test_redundancy_is_stretched_around_the_base() -> None:
    """The published formula by hand; the mean is 1, and a spread of 0 is uniform."""
    session = session_of()
    found = np.array(cosines(session))
    redundancy = (found - found.min()) / (found.max() - found.min())
    wanted = 0.4 + 0.6 * redundancy / redundancy.mean()
    assert layer_redundancy(session, 0.6) == pytest.approx(wanted.tolist(), abs=1e-5)
    assert sum(layer_redundancy(session, 0.6)) / 6 == pytest.approx(1)
    assert layer_redundancy(session, 0.0) == [1.0] * 6


@pytest.mark.parametrize("allocation", [layer_redundancy, influence])
def test_a_layer_that_does_nothing_loses_most(
    allocation: Callable[[Session, float], list[float]],
) -> None:
    """Its output is its input."""
    shares = allocation(session_of(silent=4), 0.5)
    assert max(shares) == shares[4] and sorted(shares)[-2] < shares[4]


def test_published_slices_can_exceed_everything() -> None:
    """One redundant layer among others gets more than its whole width: the projector holds it."""
    shares = [1 - 2 / 3 + 2 / 3 * one / (1 / 6) for one in (0, 0, 0, 0, 0, 1)]
    assert 0.3 * max(shares) > 1


def test_influence_is_the_optimum_of_its_objective() -> None:
    """Its derivative is the same in every layer, the mean is 1, and the least is given."""
    values = [0.3, 0.05, 0.1, 0.02, 0.4]
    shares = softmax_shares(values, 0.7)
    assert sum(shares) / 5 == pytest.approx(1)
    assert min(shares) == shares[4] == pytest.approx(0.3)
    (one, other), (low, high) = (shares[0], shares[1]), (values[1], values[0])
    eps = (high - low) / (math.log(other) - math.log(one))
    slopes = [value + eps * math.log(share) for value, share in zip(values, shares, strict=True)]
    assert slopes == pytest.approx([slopes[0]] * 5)
    assert softmax_shares(values, 0.0) == pytest.approx([1] * 5)
    assert softmax_shares([0.2] * 3, 0.5) == [1.0] * 3


def test_influence_looks_at_the_layers() -> None:
    """Its order is that of the cosines."""
    session = session_of()
    assert np.argsort(influence(session, 0.5)).tolist() == np.argsort(cosines(session)).tolist()


def test_outliers_are_counted_over_all_matrices_of_a_layer() -> None:
    """By hand with the inputs that hooks see; the mean of the shares is 1."""
    session = session_of()
    session.model.model.layers[2].mlp.up_proj.weight.data[::5, ::5] *= 12
    counted = []
    for layer in session.view.layers:
        modules = session.view.projections(layer)
        inputs: dict[Any, torch.Tensor] = {}

        def note(linear: Any, given: Any, inputs: dict[Any, torch.Tensor] = inputs) -> None:
            inputs[linear] = given[0].flatten(0, 1)

        hooks = [linear.register_forward_pre_hook(note) for linear in modules.values()]
        with torch.no_grad():
            session.model(TOKENS)
        for hook in hooks:
            hook.remove()
        every = [(one.weight.abs() * inputs[one].norm(dim=0)).flatten() for one in modules.values()]
        saliences = torch.cat(every)
        counted.append(float((saliences > OUTLIER * saliences.mean()).double().mean()))
    found = np.array(counted)
    places = (found - found.min()) / (found.max() - found.min())
    assert found.argmax() == 2 and len(set(counted)) > 2
    wanted = 1 - 2 * 0.3 * (places - places.mean())
    assert owl(session, 0.3) == pytest.approx(wanted.tolist(), abs=1e-6)
    assert outlier_share([torch.tensor([1.0] * 19), torch.tensor([99.0])]) == 1 / 20
