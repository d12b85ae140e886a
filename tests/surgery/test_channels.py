"""Tests of slm_plugin.surgery.channels."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

pytest.importorskip("torch_pruning")

from slm_plugin import extras
from slm_plugin.errors import MissingExtraError, PlanError, TargetError
from slm_plugin.models.families.llama import LLAMA
from slm_plugin.models.fingerprint import fingerprint
from slm_plugin.models.view import DecoderView, projections
from slm_plugin.plans import KeepChannels, KeepHeads, KeepQueryHeads, WidthOperation
from slm_plugin.surgery import portability
from slm_plugin.surgery.channels import apply_channels
from tests.tiny import make_model, random_tokens

LAYERS = 3
# KV groups that stay in each layer: another choice in each, head counts that every release loads.
GROUPS = {4: [(0, 2), (1, 3), (0, 1)], 2: [(1,), (0,), (1,)], 1: []}


def _channels() -> list[tuple[int, ...]]:
    generator = torch.Generator().manual_seed(5)
    return [tuple(torch.randperm(48, generator=generator)[:32].tolist()) for _ in range(LAYERS)]


def _operations(kv_heads: int) -> list[WidthOperation]:
    operations: list[WidthOperation] = [
        KeepChannels(layer=i, indices=kept) for i, kept in enumerate(_channels())
    ]
    operations += [KeepHeads(layer=i, kv_groups=kept) for i, kept in enumerate(GROUPS[kv_heads])]
    return operations


def _mask(model: PreTrainedModel, operations: Sequence[WidthOperation]) -> list[Any]:
    """Hooks that silence what the operations remove, at the inputs of down_proj and o_proj."""
    dimensions = DecoderView.of(model).dimensions()
    group = dimensions.head_dim * dimensions.queries_per_group
    hooks = []
    for operation in operations:
        if isinstance(operation, KeepChannels):
            linear, kept, width = "down_proj", operation.indices, 1
        else:
            assert isinstance(operation, KeepHeads)
            linear, kept, width = "o_proj", operation.kv_groups, group
        module = projections(model.model.layers[operation.layer], LLAMA)[linear]
        mask = torch.zeros(module.in_features)
        for unit in kept:
            mask[unit * width : (unit + 1) * width] = 1

        def silence(_: nn.Module, args: tuple[Tensor], mask: Tensor = mask) -> tuple[Tensor]:
            return (args[0] * mask,)

        hooks.append(module.register_forward_pre_hook(silence))
    return hooks


def _model(family: str = "llama", kv_heads: int = 2, **overrides: Any) -> PreTrainedModel:
    return make_model(
        family, **{"num_hidden_layers": LAYERS, "num_key_value_heads": kv_heads, **overrides}
    )


def _logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(random_tokens()).logits
    return logits


def _check_mask_equals_slice(model: PreTrainedModel, kv_heads: int) -> None:
    operations = _operations(kv_heads)
    whole = _logits(model)
    hooks = _mask(model, operations)
    masked = _logits(model)
    for hook in hooks:
        hook.remove()
    assert not torch.allclose(masked, whole, atol=1e-2)
    apply_channels(model, operations)
    torch.testing.assert_close(_logits(model), masked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_slicing_equals_silencing(family: str, kv_heads: int, tied: bool) -> None:
    """A pruned model computes what the whole one does with the removed units set to zero."""
    _check_mask_equals_slice(_model(family, kv_heads, tie_word_embeddings=tied), kv_heads)


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_slicing_equals_silencing_with_biases(kv_heads: int) -> None:
    """Biases of rows go with them; those of o_proj and down_proj stay."""
    _check_mask_equals_slice(
        _model("llama", kv_heads, attention_bias=True, mlp_bias=True), kv_heads
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_sizes_agree_everywhere(family: str, kv_heads: int, tied: bool) -> None:
    """Weights, modules and config say the same, and parameters are exactly as predicted."""
    model = _model(family, kv_heads, tie_word_embeddings=tied)
    before = DecoderView.of(model).dimensions()
    apply_channels(model, _operations(kv_heads))
    stay = {4: 2, 2: 1, 1: 1}[kv_heads]
    after = DecoderView.of(model).dimensions()
    assert after == before.without_units(channels=16, kv_groups=kv_heads - stay)
    config = model.config
    assert config.intermediate_size == 32
    assert config.num_key_value_heads == stay
    assert config.num_attention_heads == stay * 4 // kv_heads
    assert config.head_dim == 8
    for layer in model.model.layers:
        assert layer.self_attn.num_key_value_groups == 4 // kv_heads
        assert layer.mlp.intermediate_size == 32
        for linear in projections(layer, LLAMA).values():
            assert linear.weight.shape == (linear.out_features, linear.in_features)
    assert DecoderView.of(model).tied is tied


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("tied", [False, True])
def test_saved_model_loads_with_the_stock_class(
    family: str, kv_heads: int, tied: bool, tmp_path: Path
) -> None:
    """save_pretrained and AutoModelForCausalLM give back the same logits, and generation works."""
    model = _model(family, kv_heads, tie_word_embeddings=tied)
    apply_channels(model, _operations(kv_heads))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert DecoderView.of(loaded).dimensions() == DecoderView.of(model).dimensions()
    assert torch.equal(_logits(loaded), _logits(model))
    prompt = random_tokens(samples=1)
    cached, plain = (
        loaded.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=12,
            do_sample=False,
            use_cache=cache,
        )
        for cache in (True, False)
    )
    assert torch.equal(cached, plain)
    assert cached.shape[1] > prompt.shape[1]


def test_head_dim_is_written_where_the_config_left_it_to_derive(tmp_path: Path) -> None:
    """A checkpoint without head_dim gets it: derived from fewer heads it would come out wrong."""
    model = _model("qwen2", 4)
    del model.config.head_dim
    apply_channels(model, _operations(4))
    model.save_pretrained(tmp_path)
    assert torch.equal(_logits(AutoModelForCausalLM.from_pretrained(tmp_path)), _logits(model))


def test_attributes_of_older_releases_follow() -> None:
    """Head counts that attention modules of other releases keep are updated too."""
    model = _model(kv_heads=4)
    attention = model.model.layers[0].self_attn
    attention.num_heads, attention.num_key_value_heads = 4, 4
    apply_channels(model, _operations(4))
    assert (attention.num_heads, attention.num_key_value_heads) == (2, 2)
    assert not hasattr(model.model.layers[1].self_attn, "num_heads")


def test_weights_are_new_and_the_old_ones_free() -> None:
    """Slices are contiguous, own their storage, and nothing keeps the former weights."""
    model = _model()
    old = [weakref.ref(m.weight) for m in projections(model.model.layers[0], LLAMA).values()]
    apply_channels(model, _operations(2))
    assert [ref() for ref in old] == [None] * 7
    for parameter in model.parameters():
        assert parameter.is_contiguous()
        assert parameter.untyped_storage().nbytes() == parameter.nbytes
        assert parameter.is_leaf


def test_frozen_parameters_stay_frozen() -> None:
    """Flags of requires_grad are those of before, weight by weight."""
    model = _model(attention_bias=True)
    frozen = {"model.layers.0.mlp.up_proj.weight", "model.layers.1.self_attn.q_proj.bias"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    apply_channels(model, _operations(2))
    assert {n for n, p in model.named_parameters() if not p.requires_grad} == frozen


def test_number_format_stays() -> None:
    """A bfloat16 model stays bfloat16."""
    model = _model().to(torch.bfloat16)
    apply_channels(model, _operations(2))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_order_in_the_plan_does_not_matter() -> None:
    """Operations and indices in any order give the same model."""
    one, other = _model(), _model()
    apply_channels(one, _operations(2))
    reordered = [
        op.model_copy(update={"indices": op.indices[::-1]}) if isinstance(op, KeepChannels) else op
        for op in reversed(_operations(2))
    ]
    apply_channels(other, reordered)
    assert fingerprint(one) == fingerprint(other)


def test_keeping_everything_changes_no_bit() -> None:
    """No operations, or such that keep all units, leave the weights as they are."""
    model = _model()
    before = fingerprint(model)
    apply_channels(model, [])
    apply_channels(model, [KeepChannels(layer=i, indices=range(48)) for i in range(LAYERS)])
    assert fingerprint(model) == before


def _keep(*layers: tuple[int, ...]) -> list[WidthOperation]:
    return [KeepChannels(layer=i, indices=kept) for i, kept in enumerate(layers)]


@pytest.mark.parametrize(
    ("operations", "complaint"),
    [
        (_keep((0, 1), (0, 1)), r"keep_channels names layer 2 0 times; .* layers 0 to 2"),
        (_keep((0,), (0,), (0,), (0,)), "keep_channels names layer 3 1 times"),
        ([*_keep((0,), (0,), (0,)), *_keep((1,))], "keep_channels names layer 0 2 times"),
        (
            [KeepHeads(layer=i, kv_groups=kept) for i, kept in enumerate([(0, 1), (0, 1), (0,)])],
            "keep_heads keeps 1 units in one layer and 2 in another",
        ),
        (
            _keep((0, 48), (0, 1), (0, 1)),
            "layer 0: indices: names channel 48; the model has channels 0 to 47",
        ),
        (_keep((0, 1), (5, 5), (0, 1)), "layer 1: indices: names channel 5 twice"),
        (
            [KeepHeads(layer=i, kv_groups=(2,)) for i in range(LAYERS)],
            "keep_heads of layer 0: kv_groups: names KV group 2",
        ),
        ([KeepHeads(layer=0, kv_groups=(0,))], "keep_heads names layer 1 0 times"),
        (
            [KeepQueryHeads(layer=i, query_heads=(0, 1, 2)) for i in range(LAYERS)],
            "layer 0: query_heads: keeps query heads of KV groups unequally: 2 of group 0, 1 of",
        ),
        (
            [KeepQueryHeads(layer=i, query_heads=(0, 1)) for i in range(LAYERS)],
            "layer 0: query_heads: keeps query heads of KV groups unequally: 2 of group 0, 0 of",
        ),
        (
            [KeepQueryHeads(layer=i, query_heads=(0, 4)) for i in range(LAYERS)],
            "query_heads: names query head 4; the model has query heads 0 to 3",
        ),
        (
            [
                *(KeepQueryHeads(layer=i, query_heads=(0, 2)) for i in range(LAYERS)),
                *(KeepHeads(layer=i, kv_groups=(0,)) for i in range(LAYERS)),
            ],
            "keep_heads and keep_query_heads remove from the same attention",
        ),
    ],
)
def test_operations_that_do_not_fit_are_refused(
    operations: list[WidthOperation], complaint: str
) -> None:
    """What would give impossible layers is refused, before any weight changes."""
    model = _model()
    before = fingerprint(model)
    with pytest.raises(PlanError, match=complaint):
        apply_channels(model, operations)
    assert fingerprint(model) == before


def test_heads_that_cannot_be_loaded_again_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan made under transformers 4 that 5 could not load back is refused under 5."""
    model = _model(kv_heads=4)
    before = fingerprint(model)
    operations = [KeepHeads(layer=i, kv_groups=(0, 1, 2)) for i in range(LAYERS)]
    monkeypatch.setattr(portability, "found_version", lambda _: "5.23.0")
    with pytest.raises(TargetError, match="3 heads"):
        apply_channels(model, operations)
    assert fingerprint(model) == before
    monkeypatch.setattr(portability, "found_version", lambda _: "4.57.6")
    apply_channels(model, operations)
    assert model.config.num_attention_heads == 3


@pytest.mark.parametrize("kept", [(0, 2), (1, 3), (0, 1, 2, 3)])
def test_query_heads_go_from_every_group(family: str, kept: tuple[int, ...]) -> None:
    """By the whole model with the heads' columns at 0; sizes agree in modules and config."""
    model = _model(family, attention_bias=True) if family == "llama" else _model(family)
    before = DecoderView.of(model).dimensions()
    silent = _model(family, attention_bias=True) if family == "llama" else _model(family)
    with torch.no_grad():
        for layer in silent.model.layers:
            for head in {0, 1, 2, 3} - {*kept}:
                layer.self_attn.o_proj.weight[:, 8 * head : 8 * head + 8] = 0
    apply_channels(model, [KeepQueryHeads(layer=i, query_heads=kept) for i in range(LAYERS)])
    torch.testing.assert_close(_logits(model), _logits(silent), rtol=1e-4, atol=1e-5)
    after = DecoderView.of(model).dimensions()
    assert after == before.without_units(query_heads=4 - len(kept))
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads) == (len(kept), 2)
    assert config.head_dim == 8
    for layer in model.model.layers:
        assert layer.self_attn.num_key_value_groups == len(kept) // 2
        for linear in projections(layer, LLAMA).values():
            assert linear.weight.shape == (linear.out_features, linear.in_features)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch-pruning the error says what to install."""
    monkeypatch.setattr(extras, "found_version", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"slm-plugin\[width\]"):
        apply_channels(_model(), _operations(2))
