"""Captured layer inputs are what the layers see, and cost disk instead of memory."""

from __future__ import annotations

import pytest
import torch

from slm_plugin.calibration.captures import capture, run_layers
from slm_plugin.calibration.spool import Spool
from slm_plugin.errors import CalibrationError, NumericalError
from slm_plugin.models.view import DecoderView
from slm_plugin.session import Session
from tests.tiny import make_model, random_tokens


def test_layer_inputs_are_the_hidden_states(family: str) -> None:
    """Input l equals transformers' hidden state l; the final one is behind the norm."""
    model = make_model(family)
    tokens = random_tokens()
    (batch,) = capture(DecoderView.of(model), [tokens])
    with torch.no_grad():
        expected = model.model(tokens, output_hidden_states=True).hidden_states
    assert len(batch.inputs) == 7
    for index in range(6):
        torch.testing.assert_close(batch.inputs[index], expected[index])
    torch.testing.assert_close(model.model.norm(batch.inputs[6]), expected[-1])
    torch.testing.assert_close(batch.final, expected[-1])


def test_the_suffix_from_any_layer_gives_the_final_hidden_state(family: str) -> None:
    """Running layers l.. on captured inputs and arguments repeats the model's own forward."""
    model = make_model(family)
    view = DecoderView.of(model)
    (batch,) = capture(view, [random_tokens()])
    with torch.inference_mode():
        for index in range(6):
            hidden = run_layers(
                list(view.layers)[index:], batch.inputs[index], batch.arguments[index]
            )
            torch.testing.assert_close(view.norm(hidden), batch.final)


def test_capturing_leaves_no_hooks() -> None:
    """The model is as before, also when the forward fails."""
    model = make_model()
    view = DecoderView.of(model)
    list(capture(view, [random_tokens()]))
    with torch.no_grad():
        model.model.norm.weight.fill_(float("inf"))
    with pytest.raises(NumericalError):
        capture(view, [random_tokens()])
    assert not any(layer._forward_pre_hooks for layer in view.layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int64])
def test_a_spool_gives_back_the_same_bits(dtype: torch.dtype) -> None:
    """Tensors of any format and shape come back equal, in any order."""
    spool = Spool()
    tensors = [torch.randn(3, i + 1, 2).mul(100).to(dtype) for i in range(4)]
    for tensor in tensors:
        spool.append(tensor.transpose(0, 1))
    for index in (2, 0, 3, 1):
        assert torch.equal(spool[index], tensors[index].transpose(0, 1))
    assert len(spool) == 4


def test_a_session_captures_once_per_state_of_the_model() -> None:
    """The second request is free; a changed model is captured anew."""
    session = Session(make_model(), calibration=random_tokens())
    first = session.captured()
    assert session.captured() is first
    session.model_changed()
    assert session.captured() is not first


def test_a_session_without_calibration_says_so() -> None:
    """A stage that needs data and has none is told what to add."""
    with pytest.raises(CalibrationError, match="calibration:"):
        Session(make_model()).captured()
