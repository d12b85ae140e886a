"""Tests of slm_plugin.pruners.width.coupling."""

from __future__ import annotations

import gc
import warnings
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("torch_pruning")

from slm_plugin.errors import UnsupportedModelError
from slm_plugin.models.fingerprint import fingerprint
from slm_plugin.models.view import DecoderView
from slm_plugin.pruners.width.coupling import check_coupling
from slm_plugin.surgery import groups
from slm_plugin.surgery.groups import Members, channel_members, kv_group_members
from tests.tiny import make_model


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_torch_pruning_agrees_with_our_groups(
    family: str, kv_heads: int, tied: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Every family, head grouping and tying passes, without a warning or a printed line."""
    model = make_model(
        family, num_hidden_layers=2, num_key_value_heads=kv_heads, tie_word_embeddings=tied
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_coupling(DecoderView.of(model))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "shape",
    [
        {"intermediate_size": 32},
        {"intermediate_size": 64, "num_key_value_heads": 4},
        {"num_attention_heads": 1, "num_key_value_heads": 1},
        {"num_hidden_layers": 1},
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
        {"head_dim": 4, "num_key_value_heads": 4},
    ],
    ids=str,
)
def test_coincidences_of_size_do_not_confuse_the_check(shape: dict[str, Any]) -> None:
    """Equal sizes in different places, biases and single layers or heads pass too."""
    check_coupling(DecoderView.of(make_model(**{"num_hidden_layers": 2, **shape})))


def test_tracing_leaves_the_model_as_found() -> None:
    """Weights, flags, training modes, cache setting and hooks survive the trace."""
    model = make_model(num_hidden_layers=2)
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[1].train()
    model.model.layers[0].register_forward_hook(lambda *_: None)
    before = fingerprint(model), _state(model)
    with torch.no_grad():
        check_coupling(DecoderView.of(model))
    assert (fingerprint(model), _state(model)) == before
    assert model.config.use_cache is True
    assert all(parameter.grad is None for parameter in model.parameters())


def test_trace_does_not_keep_weights_alive() -> None:
    """Weights that surgery replaces afterwards are free at once, not at the next collection."""
    model = make_model(num_hidden_layers=2)
    gc.collect()
    gc.disable()
    try:
        check_coupling(DecoderView.of(model))
        old = [weakref.ref(parameter) for parameter in model.parameters()]
        del model
        assert not any(ref() is not None for ref in old)
    finally:
        gc.enable()


def test_failed_trace_leaves_no_hooks(monkeypatch: pytest.MonkeyPatch) -> None:
    """When the forward pass fails, torch-pruning's hooks do not stay on the model."""
    model = make_model(num_hidden_layers=2)
    before = _state(model)

    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(model.lm_head, "forward", fail)
    with pytest.raises(MemoryError):
        check_coupling(DecoderView.of(model))
    assert _state(model) == before


def test_wrong_channel_group_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups that pair a gate row with another down column are refused."""

    def shifted(channels: tuple[int, ...]) -> Members:
        right = channel_members(channels)
        return {**right, "down_proj": tuple(i + 1 for i in right["down_proj"])}

    monkeypatch.setattr(groups, "channel_members", shifted)
    with pytest.raises(UnsupportedModelError, match=r"couples down_proj of layer 0 differently"):
        check_coupling(DecoderView.of(make_model(num_hidden_layers=2)))


def test_wrong_attention_group_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With one query head a key head, groups that pair q with another k are refused."""

    def swapped(chosen: tuple[int, ...], dimensions: Any) -> Members:
        right = kv_group_members(chosen, dimensions)
        return {**right, "k_proj": kv_group_members((0,), dimensions)["k_proj"]}

    monkeypatch.setattr(groups, "kv_group_members", swapped)
    model = make_model(num_hidden_layers=2, num_key_value_heads=4)
    with pytest.raises(UnsupportedModelError, match=r"couples k_proj of layer 0 differently"):
        check_coupling(DecoderView.of(model))


def test_changed_forward_pass_is_noticed() -> None:
    """A branch that somebody added to the last MLP is coupled too, and refused."""
    model = make_model(num_hidden_layers=3)
    mlp = model.model.layers[2].mlp
    model.side = nn.Linear(32, 48)

    def forward(hidden: Tensor) -> Tensor:
        inner = mlp.act_fn(mlp.gate_proj(hidden)) * mlp.up_proj(hidden) + model.side(hidden)
        return mlp.down_proj(inner)

    mlp.forward = forward
    with pytest.raises(UnsupportedModelError, match=r"couples side.* of layer 2"):
        check_coupling(DecoderView.of(model))


def _state(model: nn.Module) -> list[object]:
    modules = [(m.training, len(m._forward_hooks)) for m in model.modules()]
    return [*modules, *(p.requires_grad for p in model.parameters())]
