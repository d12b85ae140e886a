"""Checkpoints of models whose layers differ in width."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

pytest.importorskip("torch_pruning")

from slm_plugin.errors import UnsupportedModelError
from slm_plugin.export import checkpoint
from slm_plugin.export.checkpoint import (
    CheckpointExporter,
    CheckpointOptions,
    save_checkpoint,
    verify_checkpoint,
)
from slm_plugin.export.padding import padded_weights, padding
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import KeepChannels
from slm_plugin.session import Session
from slm_plugin.surgery.channels import apply_channels
from tests.surgery.test_widths import CUTTABLE, kept, logits
from tests.tiny import FAMILIES, make_model

ZEROS = (40 - 16) + (40 - 24)


def uneven(family: str, **overrides: object) -> PreTrainedModel:
    """Three layers of 16, 24 and 40 channels."""
    model = make_model(family, num_hidden_layers=3, **overrides)
    apply_channels(model, kept((16, 24, 40)))
    return model


@pytest.mark.parametrize("family", CUTTABLE)
def test_padded_weights_compute_the_same(family: str) -> None:
    """In the stock class with one width, in every family: with fused matrices and biases too."""
    model = uneven(family)
    padded = make_model(family, num_hidden_layers=3, intermediate_size=40)
    padded.load_state_dict({**model.state_dict(), **padded_weights(DecoderView.of(model))})
    torch.testing.assert_close(logits(padded), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize("family", ["llama", "gemma3_tower"])
def test_a_stock_class_loads_the_padded_checkpoint(family: str, tmp_path: Path) -> None:
    """Every check of the exporter passes, and the record counts what was added."""
    model = uneven(family)
    session = Session(model)
    record = CheckpointExporter(CheckpointOptions()).export(session, tmp_path)
    assert record.padding == ZEROS * session.view.dimensions().channel_parameters > 0
    values = {check.name: check.value for check in record.checks}
    assert values.pop("largest logit difference") <= record.checks[0].tolerance
    assert set(values.values()) == {0}
    reader = getattr(transformers, DecoderView.of(model).family.auto_class)
    attention = model.config._attn_implementation
    loaded = reader.from_pretrained(tmp_path / "checkpoint", attn_implementation=attention).eval()
    assert DecoderView.of(loaded).dimensions().widths == (40, 40, 40)
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize("tied", [True, False])
def test_nothing_but_the_narrow_layers_is_touched(tied: bool, tmp_path: Path) -> None:
    """Channels come first, zeros behind them; biases that outputs have stay as they are."""
    model = uneven("llama", mlp_bias=True, tie_word_embeddings=tied)
    session = Session(model)
    save_checkpoint(session, tmp_path)
    verify_checkpoint(session, tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    own = model.state_dict()
    assert ("lm_head.weight" in stored) != tied
    assert json.loads((tmp_path / "config.json").read_text())["intermediate_size"] == 40
    for name, tensor in stored.items():
        whole = torch.zeros_like(tensor)
        whole[tuple(map(slice, own[name].shape))] = own[name]
        assert torch.equal(tensor, whole), name
    assert sum(t.numel() for t in stored.values()) == padding(session.view) + sum(
        p.numel() for p in model.parameters()
    )


def test_a_fused_matrix_is_padded_in_each_of_its_parts() -> None:
    """Gate and up of Phi-3 are one matrix: zeros stand behind each."""
    model = uneven("phi3")
    padded = padded_weights(DecoderView.of(model))
    assert len(padded) == 2 * 2
    own = model.model.layers[0].mlp.gate_up_proj.weight
    found = padded["model.layers.0.mlp.gate_up_proj.weight"]
    assert torch.equal(found[:16], own[:16]) and torch.equal(found[40:56], own[16:])
    assert not found[16:40].any() and not found[56:].any() and len(found) == 80


def test_even_layers_are_not_padded() -> None:
    """Nothing is copied."""
    view = DecoderView.of(make_model())
    assert padded_weights(view) == {} and padding(view) == 0


@pytest.mark.parametrize("family", CUTTABLE)
def test_no_stock_class_honours_a_width_per_layer(family: str) -> None:
    """`per_layer_config` of transformers 5.14 and later is refused or ignored by our families.

    A class that builds such layers no longer needs the padding: then write it for that class.
    """
    record, _ = FAMILIES[family]
    config = make_model(family, num_hidden_layers=3).config
    settings = config.to_dict()
    text = settings.get("text_config", settings)
    text["per_layer_config"] = {"1": {"intermediate_size": 16}}
    try:
        with torch.device("meta"):
            built = getattr(transformers, record.architecture)(type(config).from_dict(settings))
    except (ValueError, TypeError, AttributeError, RuntimeError):
        return
    assert not DecoderView.of(built).dimensions().layer_widths


def test_a_plan_for_one_width_in_each_layer_is_the_uniform_one(tmp_path: Path) -> None:
    """The same number in every layer, given layer by layer, loads without any padding."""
    model = make_model(num_hidden_layers=3)
    apply_channels(model, [KeepChannels(layer=i, indices=tuple(range(8, 40))) for i in range(3)])
    session = Session(model)
    save_checkpoint(session, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == model.state_dict().keys()
    assert padding(session.view) == 0


def test_a_streamed_model_of_different_widths_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tensors are copied file by file as they are."""
    monkeypatch.setattr(checkpoint, "is_streamed", lambda _: True)
    with pytest.raises(UnsupportedModelError, match="cannot be padded while the model is streamed"):
        save_checkpoint(Session(uneven("llama")), tmp_path)
    assert not list(tmp_path.iterdir())
