"""Projections in place of a sliced model: the same, and exact where nothing is left out."""

from __future__ import annotations

import pytest
import torch

from slm_plugin.calibration.components import principal_components
from slm_plugin.session import Session
from tests.benchmarks.loaded import loaded
from tests.surgery.test_hidden import in_float64, logits, small
from tests.surgery.test_stream import TOKENS, rotated


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite"])
def test_a_projected_stream_computes_what_the_sliced_model_does(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one basis for the model, in float64; 8 of 32 components are left out."""
    benchmark = loaded("stream_rotations", monkeypatch)
    model = in_float64(small(family))
    sliced = rotated(in_float64(small(family)), 24).model
    session = Session(model, calibration=TOKENS, batch_tokens=48)
    _, basis = principal_components(session.view, session.captured())
    one = basis[:, :24] @ basis[:, :24].T
    plain = logits(model)
    with benchmark.projected(session.view, dict.fromkeys(range(3), one)):
        assert torch.allclose(logits(model), logits(sliced), rtol=0, atol=1e-10)
        assert not torch.allclose(logits(model), plain, atol=1e-2)
    assert torch.equal(logits(model), plain)


@pytest.mark.parametrize("moments", ["of_stream", "moments_read"])
def test_a_basis_for_every_layer_leaves_out_the_smallest_components(
    moments: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of what its two norms see, with those below it left out; with all kept, nothing."""
    benchmark = loaded("stream_rotations", monkeypatch)
    session = Session(in_float64(small()), calibration=TOKENS, batch_tokens=48)
    view, batches, of = session.view, session.captured(), getattr(benchmark, moments)
    for whole in benchmark.per_layer(view, batches, 32, of):
        assert torch.allclose(whole, torch.eye(32, dtype=torch.float64), atol=1e-10)
    found = benchmark.per_layer(view, batches, 24, of)
    assert len(found) == 3 and all(round(float(p.trace())) == 24 for p in found)
    seen = torch.zeros(32, 32, dtype=torch.float64)

    def add(_: object, given: tuple[torch.Tensor]) -> None:
        seen.add_(of(given[0]))

    norms = (view.layers[1].input_layernorm, view.layers[1].post_attention_layernorm)
    hooks = [norm.register_forward_pre_hook(add) for norm in norms]
    with benchmark.projected(view, {0: found[0]}), torch.no_grad():
        for batch in batches:
            view.model(batch.tokens)
    for hook in hooks:
        hook.remove()
    vectors = torch.linalg.eigh(seen).eigenvectors[:, -24:]
    assert torch.allclose(found[1], vectors @ vectors.T, atol=1e-6)
