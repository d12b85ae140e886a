"""Scores of the columns of a projection, against their definitions and planted columns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import PreTrainedModel

from slm_plugin.pruners.input_sums import ReaderInputs, layer_inputs
from slm_plugin.pruners.width import input_scores
from slm_plugin.pruners.width.brain_surgeon import error_curve
from slm_plugin.session import Session
from tests.tiny import make_model, random_tokens

TOKENS = random_tokens(10, 12)
CHANNELS = 48
Score = Callable[[ReaderInputs], torch.Tensor]
SCORES: dict[str, Score] = {
    "activation": input_scores.activation,
    "contribution": lambda inputs: input_scores.contribution(inputs, 12),
    "flap": input_scores.flap,
    "leverage": input_scores.leverage,
    "obs": lambda inputs: error_curve(inputs, 12, 1),
    "wanda_sp": input_scores.wanda_sp,
}
# What a score says of a column that no weight reads: Minitron's and leverage do not look there.
LOOKS_AT_WEIGHTS = {"contribution", "flap", "obs", "wanda_sp"}


def scored(
    model: PreTrainedModel, name: str, *, layer: int = 2, batch: int = 36, reader: str = "down_proj"
) -> torch.Tensor:
    """The scores of the columns of one layer."""
    session = Session(model, calibration=TOKENS, batch_tokens=batch)
    found = [one.read_by(reader) for one in layer_inputs(session)]
    return SCORES[name](found[layer])


def seen(model: PreTrainedModel, layer: int, reader: str = "down_proj") -> torch.Tensor:
    """What a projection sees in the model's own forward pass, ``(samples, length, features)``."""
    inputs: list[torch.Tensor] = []
    block = model.model.layers[layer]
    linear = block.mlp.down_proj if reader == "down_proj" else block.self_attn.o_proj
    hook = linear.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    with torch.no_grad():
        model(TOKENS, use_cache=False)
    hook.remove()
    return inputs[0].double()


@pytest.mark.parametrize("reader", ["down_proj", "o_proj"])
@pytest.mark.parametrize("name", sorted(SCORES))
def test_a_score_is_its_definition(name: str, reader: str) -> None:
    """Written out on what the projection sees when the whole model runs."""
    model = make_model()
    block = model.model.layers[2]
    linear = block.mlp.down_proj if reader == "down_proj" else block.self_attn.o_proj
    weight, rows = linear.weight.detach().double(), seen(model, 2, reader).flatten(0, 1)
    found = scored(model, name, reader=reader)
    if name == "wanda_sp":
        expected = (weight.abs() * rows.square().mean(0).sqrt()).mean(0)
    elif name == "flap":
        expected = rows.var(0, correction=0) * weight.square().sum(0)
        expected = expected.square() if reader == "o_proj" else expected
    elif name == "activation":
        expected = seen(model, 2, reader).abs().mean(1).norm(dim=0)
    elif name == "leverage":
        gram = rows.T @ rows
        ridge = gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
        expected = (gram @ torch.linalg.inv(gram + ridge)).diagonal()
    else:
        # An order, and a curve whose definition has a test of its own.
        assert found.shape == (len(rows[0]),) and len(set(found.tolist())) == len(found)
        return
    assert torch.allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize("name", sorted(SCORES))
def test_dead_columns_go_first(name: str) -> None:
    """One that is always 0, and one that nothing reads where the score looks at weights."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[7] = 0
        model.model.layers[2].mlp.down_proj.weight[:, 19] = 0
    order = scored(model, name).argsort(stable=True).tolist()
    first = {7, 19} if name in LOOKS_AT_WEIGHTS else {7}
    assert {*order[: len(first)]} == first


@pytest.mark.parametrize("name", sorted({*SCORES} - {"contribution"}))
def test_batches_do_not_matter(name: str) -> None:
    """One sample a batch, uneven batches or all at once."""
    model = make_model()
    whole = scored(model, name, batch=1000)
    for batch in (12, 36, 84):
        assert torch.allclose(scored(model, name, batch=batch), whole, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("name", sorted(SCORES))
def test_channels_are_scored_wherever_they_stand(name: str) -> None:
    """Exchanging channels exchanges their scores."""
    model = make_model()
    before = scored(model, name)
    order = torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(1))
    mlp = model.model.layers[2].mlp
    with torch.no_grad():
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(linear.weight[order])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
    assert torch.allclose(scored(model, name), before[order], rtol=1e-3, atol=1e-9)


def test_a_constant_column_costs_flap_nothing() -> None:
    """It has no variance, whatever its size; Wanda keeps it."""
    model = make_model()
    mlp = model.model.layers[2].mlp
    hook = mlp.down_proj.register_forward_pre_hook(
        lambda _, inputs: (torch.cat([inputs[0][..., :-1], 9 + 0 * inputs[0][..., -1:]], -1),)
    )
    sums = input_scores.flap, input_scores.wanda_sp
    session = Session(model, calibration=TOKENS)
    inputs = [one.read_by("down_proj") for one in layer_inputs(session)][2]
    fluctuation, wanda = (score(inputs) for score in sums)
    hook.remove()
    assert fluctuation.argmin() == CHANNELS - 1 and wanda.argmax() == CHANNELS - 1


def test_a_contribution_sees_what_went_before() -> None:
    """Of two columns that cancel each other, removing one makes the other dear."""
    model = make_model()
    mlp = model.model.layers[2].mlp
    with torch.no_grad():
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight[4] = linear.weight[9]
        mlp.down_proj.weight[:, 4] = -mlp.down_proj.weight[:, 9]
    session = Session(model, calibration=TOKENS, batch_tokens=24)
    inputs = [one.read_by("down_proj") for one in layer_inputs(session)][2]
    places = input_scores.contribution(inputs, 30)
    # Each alone costs the same; both together cost nothing, so they leave one after another.
    assert abs(places[4] - places[9]) <= 6
    assert sorted(places.tolist()) == list(range(CHANNELS))


def test_a_group_is_scored_by_what_its_columns_add_together() -> None:
    """The norm of the sum, not the sum of norms."""
    model = make_model()
    weight = model.model.layers[1].self_attn.o_proj.weight.detach().double()
    rows = seen(model, 1, "o_proj").flatten(0, 1)
    session = Session(model, calibration=TOKENS)
    inputs = [one.read_by("o_proj") for one in layer_inputs(session)][1]
    found = input_scores.group_contribution(inputs, 16)
    for group in range(2):
        here = slice(16 * group, 16 * group + 16)
        expected = (rows[:, here] @ weight[:, here].T).norm(dim=1).mean()
        assert found[group] == pytest.approx(float(expected), rel=1e-5)
