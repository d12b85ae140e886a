"""Layers ranked by the measures of allocations: planted layers, and the same order as `width`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from slm_plugin.plans import PruningPlan
from slm_plugin.pruners.depth.layer_sparsity import LayerSparsity
from slm_plugin.pruners.influence import block_influence
from slm_plugin.pruners.layer_sparsity.redundancy import influence, layer_redundancy
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.tiny import make_model, random_tokens

TOKENS = random_tokens(4, 10)
LAYERS = 6


def plan_of(session: Session, by: str, removed: int = 2, **options: int) -> PruningPlan:
    """The plan by a measure."""
    made = LayerSparsity.Options(by=by, **options)
    return session.plan(LayerSparsity(made, Target(layers_removed=removed)))


def exponents(session: Session) -> list[float]:
    """Mean exponent of every layer's maps from their singular values, numpy alone."""
    found = []
    for layer in session.view.layers:
        each = []
        for linear in session.view.projections(layer).values():
            values = np.linalg.svd(linear.weight.detach().double().numpy(), compute_uv=False) ** 2
            tail = np.sort(values)[len(values) // 2 :]
            each.append(1 + len(tail) / np.log(tail / tail[0]).sum())
        found.append(float(np.mean(each)))
    return found


def dropped(plan: PruningPlan) -> list[int]:
    """The removed layers, in order."""
    return [index for one in plan.operations for index in one.indices]


def test_layers_of_the_largest_exponents_go() -> None:
    """By singular values, for every number of layers."""
    session = Session(make_model(num_hidden_layers=LAYERS))
    found = exponents(session)
    wanted = sorted(range(LAYERS), key=lambda index: -found[index])
    for removed in (1, 3, 5):
        assert dropped(plan_of(session, "alpha", removed)) == wanted[:removed]


@pytest.mark.parametrize("by", ["alpha", "alpha_peak"])
def test_a_layer_of_flat_spectra_goes_first(by: str) -> None:
    """Singular values within one percent have a far larger exponent than random ones."""
    model = make_model(num_hidden_layers=LAYERS)
    session = Session(model)
    with torch.no_grad():
        for linear in session.view.projections(session.view.layers[3]).values():
            left, values, right = torch.linalg.svd(linear.weight, full_matrices=False)
            flat = torch.linspace(1.01, 1.0, len(values))
            linear.weight.copy_(left @ flat.diag() @ right)
    assert dropped(plan_of(session, by, 1)) == [3]


def test_a_layer_with_outliers_stays() -> None:
    """Every fortieth weight twenty times as large: far more than five times the mean."""
    session = Session(make_model(num_hidden_layers=LAYERS), calibration=TOKENS)
    free = dropped(plan_of(session, "owl", LAYERS - 1))
    with torch.no_grad():
        for linear in session.view.projections(session.view.layers[free[0]]).values():
            linear.weight.view(-1)[::40] *= 20
    assert free[0] not in dropped(plan_of(session, "owl", LAYERS - 1))


def test_protected_layers_stay() -> None:
    """Those at both ends."""
    session = Session(make_model(num_hidden_layers=LAYERS))
    plan = plan_of(session, "alpha", 3, protect_first=2, protect_last=1)
    assert sorted(dropped(plan)) == [2, 3, 4]


def test_other_allocations_rank_as_block_influence() -> None:
    """So they are no options here."""
    session = Session(make_model(num_hidden_layers=LAYERS), calibration=TOKENS)
    influences = block_influence(session.view, session.captured())
    wanted = sorted(range(LAYERS), key=lambda index: influences[index])
    for allocation in (influence, layer_redundancy):
        found = allocation(session, 0.3)
        assert sorted(range(LAYERS), key=lambda index: -found[index]) == wanted
