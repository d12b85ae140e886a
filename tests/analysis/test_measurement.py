"""Figures of an analysis against plain hooks on the whole model, and planted structure."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import PreTrainedModel

from slm_plugin.analysis.measurement import measure, outlier
from slm_plugin.analysis.record import Figures
from slm_plugin.errors import CalibrationError, NumericalError
from slm_plugin.pruners.depth.measures.cka import gram, gram_cka
from slm_plugin.session import Session
from tests.tiny import make_model, random_tokens

LAYERS, SAMPLES, LENGTH = 5, 6, 12
Array = NDArray[np.float64]


def session_of(model: PreTrainedModel, samples: int = SAMPLES, **changes: int) -> Session:
    """A session on random tokens."""
    return Session(model, calibration=random_tokens(samples, LENGTH), **changes)  # type: ignore[arg-type]


@torch.no_grad()
def hooked(model: PreTrainedModel) -> dict[str, Array]:
    """Input of layer 0 and outputs of layers and blocks, by plain hooks, all samples at once."""
    found: dict[str, list[Tensor]] = {"layer": [], "self_attn": [], "mlp": []}

    def note(kind: str, output: Tensor | tuple[Tensor, ...]) -> None:
        found[kind].append(output[0] if isinstance(output, tuple) else output)

    hooks = []
    for layer in model.model.layers:
        modules: list[tuple[str, nn.Module]] = [("layer", layer)]
        modules += [(kind, layer.get_submodule(kind)) for kind in ("self_attn", "mlp")]
        for kind, module in modules:
            hooks.append(module.register_forward_hook(lambda _m, _a, o, kind=kind: note(kind, o)))
    tokens = random_tokens(SAMPLES, LENGTH)
    found["layer"].append(model.model.embed_tokens(tokens))
    model(tokens)
    for hook in hooks:
        hook.remove()
    return {kind: torch.stack(parts).double().numpy() for kind, parts in found.items()}


def explicit_cka(x: Array, y: Array) -> float:
    """Biased CKA with the centring matrix written out."""
    k, m = (a.reshape(len(a), -1) @ a.reshape(len(a), -1).T for a in (x, y))
    h = np.eye(len(k)) - 1 / len(k)
    return float(
        np.trace(k @ h @ m @ h) / math.sqrt(np.trace(k @ h @ k @ h) * np.trace(m @ h @ m @ h))
    )


def cosine(x: Array, y: Array) -> Array:
    """Cosine along the last axis."""
    lengths = np.linalg.norm(x, axis=-1) * np.linalg.norm(y, axis=-1)
    return np.asarray((x * y).sum(-1) / lengths)


def make_identity(model: PreTrainedModel, *indices: int) -> None:
    """Make layers pass their input through unchanged, bit by bit."""
    with torch.no_grad():
        for index in indices:
            model.model.layers[index].self_attn.o_proj.weight.zero_()
            model.model.layers[index].mlp.down_proj.weight.zero_()


@pytest.mark.parametrize("batch_tokens", [1, 2 * LENGTH, 4 * LENGTH, 1024])
def test_figures_are_those_of_plain_hooks(family: str, batch_tokens: int) -> None:
    """CKA, cosines, influence and norms, whatever the batches; the last layer before the norm."""
    model = make_model(family, num_hidden_layers=LAYERS)
    seen = hooked(model)
    states, outputs = seen["layer"], seen["layer"][1:]
    figures = measure(session_of(model, batch_tokens=batch_tokens))
    tolerance = {"rtol": 1e-5, "atol": 1e-6}
    biased = [[explicit_cka(x, y) for y in outputs] for x in outputs]
    np.testing.assert_allclose(figures.cka.biased, biased, **tolerance)
    grams = [gram(torch.from_numpy(x)) for x in outputs]
    unbiased = [[gram_cka(x, y, "unbiased") for y in grams] for x in grams]
    np.testing.assert_allclose(figures.cka.unbiased, unbiased, **tolerance)
    unit = outputs / np.linalg.norm(outputs, axis=-1, keepdims=True)
    biased = [[explicit_cka(x, y) for y in unit] for x in unit]
    np.testing.assert_allclose(figures.cka_unit_tokens.biased, biased, **tolerance)
    same = [[cosine(x, y).mean() for y in outputs] for x in outputs]
    np.testing.assert_allclose(figures.cosine.same_token, same, **tolerance)
    influence = [1 - cosine(states[i], states[i + 1]).mean() for i in range(LAYERS)]
    np.testing.assert_allclose(figures.block_influence, influence, **tolerance)
    for name, vectors in (
        ("output", outputs),
        ("update", np.diff(states, axis=0)),
        ("attention", seen["self_attn"]),
        ("mlp", seen["mlp"]),
    ):
        norms = np.linalg.norm(vectors, axis=-1).reshape(LAYERS, -1)
        found = getattr(figures.norms, name)
        np.testing.assert_allclose([one.mean for one in found], norms.mean(1), **tolerance)
        middle = np.sort(norms, axis=1)[:, (norms.shape[1] - 1) // 2]
        np.testing.assert_allclose([one.median for one in found], middle, **tolerance)


def test_other_tokens_are_all_pairs_of_different_tokens() -> None:
    """The mean over every pair of two tokens of the set, each pair taken on its own."""
    model = make_model(num_hidden_layers=3)
    outputs = hooked(model)["layer"][1:].reshape(3, -1, 32)
    pairs = [(s, t) for s in range(outputs.shape[1]) for t in range(outputs.shape[1]) if s != t]
    first, second = (list(side) for side in zip(*pairs, strict=True))
    expected = [[cosine(x[first], y[second]).mean() for y in outputs] for x in outputs]
    found = measure(session_of(model)).cosine.other_token
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_identity_layers_have_no_influence_and_a_neighbour_like_themselves(family: str) -> None:
    """Influence and updates 0; CKA and cosine 1 with the layer below, and equal rows."""
    model = make_model(family, num_hidden_layers=LAYERS)
    make_identity(model, 0, 3)
    figures = measure(session_of(model))
    for layer in range(LAYERS):
        planted = layer in (0, 3)
        assert (figures.block_influence[layer] < 1e-12) == planted
        assert (figures.norms.update[layer].mean == 0) == planted
        assert (figures.norms.mlp[layer].mean == 0) == planted
    for matrix in (figures.cka.biased, figures.cka.unbiased, figures.cosine.same_token):
        assert matrix[2][3] == pytest.approx(1, abs=1e-9)
        assert matrix[1][2] < 1 - 1e-4
        assert matrix[2] == pytest.approx(matrix[3], abs=1e-9)


def test_one_outlying_token_decides_cka_until_tokens_have_unit_length() -> None:
    """A token that one layer blows up: one direction is left and CKA 1 above it, by both."""
    model = make_model(num_hidden_layers=4)
    with torch.no_grad():
        # Only the first sample holds the token, whose embedding towers over all layers' additions.
        model.model.embed_tokens.weight[1] = 1e4 * torch.sign(model.model.embed_tokens.weight[1])
    session = session_of(model)
    assert session.calibration is not None
    session.calibration[0, 3] = 1
    figures = measure(session)
    assert max(figures.cka.directions) == pytest.approx(1, abs=1e-3)
    assert min(min(row) for row in figures.cka.biased) > 0.999
    for found in figures.outliers:
        assert (found.sample, found.position) == (0, 3)
        # The rest lies in the other samples, which differ from the mean by its share in that.
        assert found.share == pytest.approx(1 - 1 / SAMPLES, abs=1e-3)
    assert min(figures.cka_unit_tokens.directions) > 3
    assert min(min(row) for row in figures.cka_unit_tokens.unbiased) < 0.95


def test_the_outlier_differs_most_from_the_mean_sample() -> None:
    """Not the longest vector: one that all samples share makes no difference between them."""
    states = torch.zeros(2, 3, 2)
    states[:, 0] = 100.0
    states[1, 1] = torch.tensor([3.0, 4.0])
    states[0, 2, 0] = 5.0
    states[1, 2, 0] = -5.0
    found = outlier(states)
    # Two deviations of 2.5 at position 1, of 5 at position 2: 50 of 62.5 in two equal halves.
    assert found.position == 2 and found.share == pytest.approx(25 / 62.5)


def test_directions_count_those_in_which_samples_differ(tiny_figures: Figures) -> None:
    """Between 1 and samples - 1, from the eigenvalues of the centred Gram."""
    outputs = hooked(make_model(num_hidden_layers=3))["layer"][1:].reshape(3, SAMPLES, -1)
    for states, found in zip(outputs, tiny_figures.cka.directions, strict=True):
        values = np.linalg.svd(states - states.mean(0), compute_uv=False) ** 2
        assert found == pytest.approx(values.sum() ** 2 / (values**2).sum(), rel=1e-5)
        assert 1 < found < SAMPLES - 1


def test_the_floors_tell_noise_from_likeness(tiny_figures: Figures) -> None:
    """Noise: biased CKA near 1, unbiased 0 within its scatter; chance is no likeness."""
    noise = tiny_figures.noise
    assert noise.biased > 0.97
    assert 0 < noise.scatter < 0.5
    # The mean of 28 pairs that share their sets.
    assert abs(noise.unbiased) < noise.scatter
    chance = np.array(tiny_figures.cka.biased_by_chance)
    assert ((chance > 0) & (chance < 1)).all()


@pytest.fixture(scope="module")
def tiny_figures() -> Figures:
    """Figures of a tiny model."""
    return measure(session_of(make_model(num_hidden_layers=3)))


def test_the_seed_draws_the_noise_and_nothing_else(tiny_figures: Figures) -> None:
    """Equal seeds give equal figures; another seed changes the noise control only."""
    model = make_model(num_hidden_layers=3)
    assert measure(session_of(model)) == tiny_figures
    other = measure(session_of(model, seed=5))
    assert other.noise != tiny_figures.noise
    assert other == tiny_figures.model_copy(update={"noise": other.noise})


def test_three_samples_are_refused_before_the_model_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The unbiased estimator needs four."""
    session = session_of(make_model(num_hidden_layers=2), samples=3)
    monkeypatch.setattr(Session, "captured", lambda _self: pytest.fail("the model ran"))
    with pytest.raises(CalibrationError, match="needs 4 samples or more; there are 3"):
        measure(session)


def test_a_session_without_calibration_is_refused() -> None:
    """There is nothing to measure on."""
    with pytest.raises(CalibrationError, match="needs calibration data"):
        measure(Session(make_model(num_hidden_layers=2)))


def test_nan_in_the_model_is_an_error() -> None:
    """No figure is made of it."""
    model = make_model(num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(NumericalError):
        measure(session_of(model))
