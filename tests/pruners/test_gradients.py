"""Tests of slm_plugin.pruners.gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from slm_plugin.errors import NumericalError
from slm_plugin.models.families.llama import LLAMA
from slm_plugin.models.fingerprint import fingerprint
from slm_plugin.models.view import DecoderView, projections
from slm_plugin.pruners.gradients import loss_gradients, only_trainable
from slm_plugin.surgery.groups import kv_group_members
from tests.tiny import make_model, random_tokens

GROUPINGS = [4, 2, 1]


def _mean_loss(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Next-token cross entropy written out, all samples at once."""
    logits = model(input_ids=tokens, use_cache=False).logits.float()
    return functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def _gradients(model: PreTrainedModel, tokens: Tensor) -> list[dict[str, Tensor]]:
    return loss_gradients(DecoderView.of(model), tokens.split(3))


@pytest.mark.parametrize("kv_heads", GROUPINGS)
def test_gradients_are_those_of_the_mean_over_all_samples(family: str, kv_heads: int) -> None:
    """Uneven batches add up to the gradient of one mean over all predicted tokens."""
    model = make_model(family, num_hidden_layers=2, num_key_value_heads=kv_heads)
    tokens = random_tokens(samples=4)
    found = _gradients(model, tokens)
    _mean_loss(model, tokens).backward()
    for layer, gradients in zip(model.model.layers, found, strict=True):
        for name, linear in projections(layer, LLAMA).items():
            torch.testing.assert_close(gradients[name], linear.weight.grad, rtol=1e-4, atol=1e-7)


def test_nothing_is_left_on_the_model() -> None:
    """Bits, requires_grad, .grad and hooks are as found, also where gradients were there before."""
    model = make_model(num_hidden_layers=2)
    model.model.embed_tokens.weight.requires_grad_(False)
    own = torch.ones_like(model.model.layers[0].mlp.up_proj.weight)
    model.model.layers[0].mlp.up_proj.weight.grad = own
    before = fingerprint(model)
    flags = [p.requires_grad for p in model.parameters()]
    _gradients(model, random_tokens())
    assert fingerprint(model) == before
    assert [p.requires_grad for p in model.parameters()] == flags
    holders = [name for name, p in model.named_parameters() if p.grad is not None]
    assert holders == ["model.layers.0.mlp.up_proj.weight"]
    assert model.model.layers[0].mlp.up_proj.weight.grad is own
    assert own.eq(1).all()
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_flags_come_back_when_the_block_fails() -> None:
    """An error inside only_trainable still restores requires_grad and .grad."""
    model = make_model(num_hidden_layers=2)
    chosen = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(RuntimeError), only_trainable(model, [chosen]):
        assert [p is chosen for p in model.parameters() if p.requires_grad] == [True]
        model(input_ids=random_tokens(), labels=random_tokens()).loss.backward()
        raise RuntimeError
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_gradients_are_taken_where_autograd_is_off() -> None:
    """A caller under no_grad gets the same gradients."""
    model = make_model(num_hidden_layers=2)
    expected = _gradients(model, random_tokens())
    with torch.no_grad():
        found = _gradients(model, random_tokens())
    for a, b in zip(found, expected, strict=True):
        assert all(torch.equal(a[name], b[name]) for name in a)


def test_half_precision_sums_in_float32() -> None:
    """Gradients of a bfloat16 model are float32 sums, not bfloat16 ones."""
    model = make_model(num_hidden_layers=2).to(torch.bfloat16)
    tokens = random_tokens(samples=9)
    found = _gradients(model, tokens)[0]["up_proj"]
    each = [_gradients(model, sample)[0]["up_proj"] for sample in tokens.split(3)]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.stack(each).double().mean(0).float())


def test_loss_that_is_not_a_number_is_refused() -> None:
    """NaN in the weights ends in NumericalError, with the model's flags restored."""
    model = make_model(num_hidden_layers=2)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(NumericalError, match="loss is nan"):
        _gradients(model, random_tokens())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("kv_heads", GROUPINGS)
def test_signed_saliences_obey_the_scale_identities(family: str, kv_heads: int) -> None:
    """Scaling a producer equals scaling its consumer, head by head of a KV group.

    The sums of w * dL/dw must agree between up and down for every channel, between v and o over
    the query heads that read it, and between q over those heads and k (up to q's and k's norms
    in Qwen3 and the biases, which scale along).
    """
    model = make_model(family, num_hidden_layers=2, num_key_value_heads=kv_heads)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
    dimensions = DecoderView.of(model).dimensions()
    for layer, gradients in zip(
        model.model.layers, _gradients(model, random_tokens()), strict=True
    ):
        signed = {n: m.weight.detach() * gradients[n] for n, m in projections(layer, LLAMA).items()}
        _assert_close(signed["up_proj"].sum(1), signed["down_proj"].sum(0))
        queries_per_group = dimensions.queries_per_group
        values = signed["v_proj"].sum(1).view(kv_heads, 8)
        outputs = signed["o_proj"].sum(0).view(kv_heads, queries_per_group, 8).sum(1)
        _assert_close(values, outputs)
        for group in range(kv_heads):
            members = kv_group_members((group,), dimensions)
            queries = signed["q_proj"][list(members["q_proj"])].sum()
            keys = signed["k_proj"][list(members["k_proj"])].sum()
            if family == "qwen3":
                # The norm behind q and k undoes any scale.
                _assert_close(queries, torch.tensor(0.0))
                _assert_close(keys, torch.tensor(0.0))
            else:
                _assert_close(queries, keys)


def test_gradients_predict_what_scaling_a_channel_does() -> None:
    """Central differences of the loss agree with the summed saliences of down_proj's column."""
    model = make_model(num_hidden_layers=2)
    tokens = random_tokens()
    down = model.model.layers[1].mlp.down_proj.weight
    predicted = (down.detach() * _gradients(model, tokens)[1]["down_proj"]).sum(0)
    channel = int(predicted.abs().argmax())
    original = down.detach()[:, channel].clone()
    losses = []
    with torch.no_grad():
        for scale in (1.05, 0.95):
            down[:, channel] = original * scale
            losses.append(_mean_loss(model, tokens).double())
            down[:, channel] = original
    measured = (losses[0] - losses[1]) / 0.1
    torch.testing.assert_close(measured.float(), predicted[channel], rtol=1e-2, atol=0)


def _assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=2e-5)
