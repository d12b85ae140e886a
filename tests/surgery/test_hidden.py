"""Removal of hidden channels from the whole model."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from slm_plugin.errors import PlanError, TargetError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import DropLayers, KeepChannels, KeepHeads, KeepHidden, Operation
from slm_plugin.surgery import apply_operations
from slm_plugin.surgery.hidden import coupled
from slm_plugin.surgery.portability import portability
from tests.tiny import FAMILIES, SMOLLM2, make_checkpoint, make_model, random_tokens

TOKENS = random_tokens(2, 12)
REMOVABLE = sorted(name for name, (record, _) in FAMILIES.items() if record.hidden_channels)
# Of 32, in no order; 24 is a multiple of the four heads, as transformers 5 wants it of Llama.
KEPT = tuple(torch.randperm(32, generator=torch.Generator().manual_seed(2)).tolist())[:24]
REMOVED = sorted({*range(32)} - {*KEPT})


def small(family: str = "llama", **changes: Any) -> PreTrainedModel:
    """A model of few layers, whose epsilon is large enough to be seen."""
    return make_model(family, num_hidden_layers=2, rms_norm_eps=0.05, **changes)


def in_float64(model: PreTrainedModel) -> PreTrainedModel:
    """The model in float64, with norms that compute in it too; transformers' round to float32."""
    for module in model.double().modules():
        if hasattr(module, "variance_epsilon"):
            module.forward = lambda x, norm=module: (
                norm.weight * x * torch.rsqrt(x.square().mean(-1, True) + norm.variance_epsilon)
            )
    return model


def logits(model: PreTrainedModel) -> Tensor:
    """Of all tokens."""
    with torch.no_grad():
        found: Tensor = model(TOKENS, use_cache=False).logits
    return found


def silenced(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in which nothing ever writes to the removed channels: they are 0 everywhere."""
    made = copy.deepcopy(model)
    view = DecoderView.of(made)
    with torch.no_grad():
        view.embedding.weight[:, REMOVED] = 0
        for layer in view.layers:
            for name in ("o_proj", "down_proj"):
                for parameter in view.projections(layer)[name].parameters():
                    parameter[REMOVED] = 0
    return made


@pytest.mark.parametrize("family", REMOVABLE)
def test_channels_that_are_zero_go_at_no_cost(family: str) -> None:
    """In float64 to the last digits; the norms still divide by the former number of channels."""
    model = silenced(small(family)).double()
    expected = logits(in_float64(copy.deepcopy(model)))
    apply_operations(model, [KeepHidden(indices=KEPT)])
    assert torch.allclose(logits(in_float64(model)), expected, rtol=0, atol=1e-12)


def test_without_their_factors_the_norms_compute_something_else() -> None:
    """The weight and the epsilon both count."""
    model = silenced(small())
    expected = logits(model)
    apply_operations(model, [KeepHidden(indices=KEPT)])
    plain, epsilon = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        for one in coupled(DecoderView.of(plain)):
            if one.parameter.dim() == 1:
                one.parameter.mul_(math.sqrt(24 / 32))
    for module in epsilon.modules():
        if hasattr(module, "variance_epsilon"):
            module.variance_epsilon = 0.05
    assert torch.allclose(logits(model), expected, atol=1e-5)
    assert not torch.allclose(logits(plain), expected, atol=1e-2)
    assert not torch.allclose(logits(epsilon), expected, atol=1e-3)


def forward(model: PreTrainedModel, mask: Tensor) -> Tensor:
    """Llama by its formulas in float64, with the residual stream times a mask of its channels."""
    weights = {name: value.double() for name, value in model.state_dict().items()}
    config, length = model.config, TOKENS.shape[1]
    angles = torch.arange(length)[:, None] * 10_000.0 ** (-torch.arange(4) / 4.0)
    cos, sin = (f(torch.cat([angles, angles], -1)).double() for f in (torch.cos, torch.sin))

    def norm(x: Tensor, name: str) -> Tensor:
        mean = x.square().sum(-1, keepdim=True) / len(mask)
        return weights[name] * x / (mean + config.rms_norm_eps).sqrt()

    def heads(x: Tensor, name: str, count: int) -> Tensor:
        return (x @ weights[name].T).view(len(x), length, count, 8).transpose(1, 2)

    def turned(x: Tensor) -> Tensor:
        return x * cos + torch.cat([-x[..., 4:], x[..., :4]], -1) * sin

    x = weights["model.embed_tokens.weight"][TOKENS] * mask
    for index in range(2):
        at = f"model.layers.{index}"
        seen = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = (
            heads(seen, f"{at}.self_attn.{name}_proj.weight", count)
            for name, count in (("q", 4), ("k", 2), ("v", 2))
        )
        k, v = turned(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
        scores = turned(q) @ k.transpose(-1, -2) / math.sqrt(8)
        shares = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -math.inf)
        mixed = (shares.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + mask * (mixed @ weights[f"{at}.self_attn.o_proj.weight"].T)
        seen = norm(x, f"{at}.post_attention_layernorm.weight")
        gate, up = (seen @ weights[f"{at}.mlp.{name}_proj.weight"].T for name in ("gate", "up"))
        x = x + mask * ((F.silu(gate) * up) @ weights[f"{at}.mlp.down_proj.weight"].T)
    return norm(x, "model.norm.weight") @ weights["lm_head.weight"].T


def test_deletion_is_masking_in_a_forward_pass_by_hand() -> None:
    """A pass written from the formulas, with the removed channels times 0 behind every block."""
    model = small()
    mask = torch.zeros(32, dtype=torch.float64)
    assert torch.allclose(forward(model, mask + 1), logits(model).double(), atol=1e-4)
    mask[list(KEPT)] = 1
    masked = forward(model, mask)
    apply_operations(model, [KeepHidden(indices=KEPT)])
    assert torch.allclose(logits(in_float64(model)), masked, rtol=0, atol=1e-6)


@pytest.mark.parametrize("tied", [False, True])
def test_all_units_go_together(tied: bool) -> None:
    """The result has the predicted sizes, in any order, and computes what silencing does."""
    model = small(attention_bias=True, mlp_bias=True, tie_word_embeddings=tied)
    view = DecoderView.of(model)
    before = view.dimensions()
    channels = [KeepChannels(layer=i, indices=tuple(range(i, 40 + i))) for i in range(2)]
    operations: list[Operation] = [
        KeepHidden(indices=KEPT),
        *channels,
        *(KeepHeads(layer=i, kv_groups=(i,)) for i in range(2)),
    ]
    expected = silenced(model)
    apply_operations(expected, operations[1:])
    apply_operations(model, operations)
    after = before.without_hidden(8).without_units(channels=8, kv_groups=1)
    assert view.dimensions() == after
    assert after == before.without_units(channels=8, kv_groups=1).without_hidden(8)
    assert torch.allclose(logits(model), logits(expected), atol=1e-5)
    assert view.tied == tied


@pytest.mark.parametrize("tied", [False, True])
def test_sizes_agree_everywhere(family: str, tied: bool) -> None:
    """Weights, modules and config say the same; flags of training stay."""
    model = small(family, tie_word_embeddings=tied)
    view = DecoderView.of(model)
    view.embedding.weight.requires_grad_(False)
    apply_operations(model, [KeepHidden(indices=KEPT)])
    config = model.config
    assert (config.hidden_size, config.head_dim) == (24, 8)
    assert config.rms_norm_eps == pytest.approx(0.05 * 32 / 24)
    assert view.embedding.embedding_dim == 24
    for linear in (view.head, *view.projections(view.layers[1]).values()):
        assert (linear.out_features, linear.in_features) == linear.weight.shape
    assert view.layers[0].hidden_size == view.layers[0].mlp.hidden_size == 24
    assert not view.embedding.weight.requires_grad and view.norm.weight.requires_grad
    assert (view.head.weight is view.embedding.weight) == tied


def test_layers_of_different_widths_lose_hidden_channels_too() -> None:
    """Every count of parameters follows from the sizes."""
    model = small()
    apply_operations(
        model, [KeepChannels(layer=i, indices=tuple(range(n))) for i, n in enumerate((16, 40))]
    )
    view = DecoderView.of(model)
    before = view.dimensions()
    apply_operations(model, [KeepHidden(indices=KEPT)])
    assert view.dimensions() == before.without_hidden(8)
    assert before.hidden_parameters == sum(one.parameter.numel() for one in coupled(view)) // 24


def test_the_cost_of_a_channel_is_that_of_the_published_sizes() -> None:
    """SmolLM2-135M: a column of the tied embedding and of every layer, and an entry of the norm."""
    assert SMOLLM2.hidden_parameters == 49_152 + 1 + 30 * (2 * 576 + 2 * 192 + 3 * 1536 + 2)
    assert SMOLLM2.without_hidden(576 - 1).hidden_parameters == SMOLLM2.hidden_parameters
    assert SMOLLM2.without_hidden(576 - 1).parameters == SMOLLM2.hidden_parameters


def test_the_stock_class_loads_it(tmp_path: Path) -> None:
    """And computes the same logits; `head_dim` is in the config, where the class derives it."""
    model = small(tie_word_embeddings=True)
    apply_operations(model, [KeepHidden(indices=KEPT)])
    model.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert (stock.config.hidden_size, stock.config.head_dim) == (24, 8)
    assert torch.equal(logits(stock), logits(model))


@pytest.mark.parametrize(
    ("family", "operations", "said"),
    [
        ("llama", [KeepHidden(indices=(0, 32))], "names hidden channel 32; the model has"),
        ("llama", [KeepHidden(indices=(1, 1))], "names hidden channel 1 twice"),
        ("llama", [KeepHidden(indices=KEPT)] * 2, "the plan has keep_hidden 2 times"),
        ("gemma2", [KeepHidden(indices=KEPT)], "no hidden channel of Gemma2ForCausalLM"),
        ("llama", [KeepHidden(indices=KEPT), DropLayers(indices=(0,))], "mixes depth and width"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_changes(
    family: str, operations: list[Operation], said: str
) -> None:
    """With the place, and the model as it was."""
    model = make_model(family, num_hidden_layers=2)
    before = logits(model)
    with pytest.raises(PlanError, match=said):
        apply_operations(model, operations)
    assert torch.equal(logits(model), before)


def test_streamed_layers_are_refused(tmp_path: Path) -> None:
    """Every weight changes, and theirs are on the disk."""
    model, _ = load(ModelSource(id=str(make_checkpoint(tmp_path)), memory="layerwise"))
    with pytest.raises(PlanError, match="one layer at a time"):
        apply_operations(model, [KeepHidden(indices=KEPT)])


def judged(release: str, monkeypatch: pytest.MonkeyPatch, hidden: int) -> tuple[str, ...]:
    """What a release of transformers makes of SmolLM2-135M with fewer hidden channels."""
    from slm_plugin.surgery import portability as rules

    monkeypatch.setattr(rules, "found_version", lambda _: release)
    after: Dimensions = SMOLLM2.without_hidden(hidden)
    return portability(SMOLLM2, after, make_model().config)


def test_readers_that_want_multiples_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A release wants a multiple of the nine heads, kernels one of 8 or 64."""
    assert any("no multiple of it" in said for said in judged("4.57.6", monkeypatch, 64))
    with pytest.raises(TargetError, match="no multiple of it") as caught:
        judged("5.1.0", monkeypatch, 64)
    assert caught.value.hint == "keep a multiple of 9 hidden channels"
    said = judged("5.1.0", monkeypatch, 9)
    assert any(one.startswith("hidden_size 567 is no longer a multiple of 8") for one in said)
    assert not any("multiple of 8:" in one for one in judged("5.1.0", monkeypatch, 72))
