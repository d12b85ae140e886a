"""Depth surgery: a merged or shortened model is still a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from slm_plugin.errors import PlanError
from slm_plugin.plans import DropLayers, MergeLayers
from slm_plugin.surgery.layers import apply_layers
from tests.oracles.slm_released import merge
from tests.tiny import make_model, random_tokens

RULES = ["telescoped", "rdsc", "mean", "keep_low", "keep_high", "ema(0.5)"]


@torch.no_grad()
def greedy(model: PreTrainedModel, tokens: torch.Tensor, *, use_cache: bool) -> torch.Tensor:
    """Eight greedy tokens after the prompt."""
    return model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=8,
        min_new_tokens=8,
        do_sample=False,
        use_cache=use_cache,
    )


@pytest.mark.parametrize(("rule", "tied"), [(rule, i % 2 == 0) for i, rule in enumerate(RULES)])
def test_a_merged_model_survives_the_disk_and_the_cache(
    family: str, rule: str, tied: bool, tmp_path: Path
) -> None:
    """Stock reload gives the same logits; greedy tokens agree with and without KV cache."""
    model = make_model(family, tie_word_embeddings=tied)
    apply_layers(
        model,
        [MergeLayers(first=3, last=4, rule=rule), MergeLayers(first=0, last=1, rule=rule)],
    )
    assert model.config.num_hidden_layers == len(model.model.layers) == 4
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = random_tokens(2)
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)
    assert torch.equal(
        greedy(model, tokens, use_cache=True), greedy(loaded, tokens, use_cache=True)
    )
    assert torch.equal(
        greedy(loaded, tokens, use_cache=True), greedy(loaded, tokens, use_cache=False)
    )
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied


def test_merging_in_place_equals_the_transcription(family: str) -> None:
    """Two merges in one call give the logits of two copies of the released loop."""
    model = make_model(family)
    expected = merge(merge(model, 3, 4), 0, 2)
    runs = ((3, 4), (0, 2))
    apply_layers(model, [MergeLayers(first=a, last=b, weights_only=True) for a, b in runs])
    tokens = random_tokens()
    with torch.no_grad():
        torch.testing.assert_close(model(tokens).logits, expected(tokens).logits)


def test_dropping_keeps_the_other_layers_themselves(family: str) -> None:
    """Kept layers are the same objects in the same order, renumbered from 0."""
    model = make_model(family)
    layers = list(model.model.layers)
    apply_layers(model, [DropLayers(indices=(1, 4))])
    assert list(model.model.layers) == [layers[i] for i in (0, 2, 3, 5)]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2, 3]


def test_per_layer_lists_follow_the_kept_layers(tmp_path: Path) -> None:
    """layer_types keeps the entries of kept layers, and modules keep their own kind."""
    kinds = ["full_attention"] * 2 + ["sliding_attention"] * 4
    model = make_model(
        "qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2, layer_types=kinds
    )
    apply_layers(model, [DropLayers(indices=(0, 5))])
    assert model.config.layer_types == ["full_attention"] + ["sliding_attention"] * 3
    assert model.config.max_window_layers == 1
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = random_tokens()
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits)


def test_a_list_that_is_not_by_layer_stays() -> None:
    """Three end tokens of a model of three layers are no list by layer."""
    model = make_model(num_hidden_layers=3, eos_token_id=[2, 5, 7])
    apply_layers(model, [DropLayers(indices=(1,))])
    assert model.config.eos_token_id == [2, 5, 7]


def test_no_parameter_is_shared_by_two_layers(family: str) -> None:
    """Merged layers own what they took over: every storage has one owner."""
    model = make_model(family)
    apply_layers(
        model, [MergeLayers(first=1, last=3), MergeLayers(first=4, last=5, rule="keep_low")]
    )
    owners = [p.data_ptr() for layer in model.model.layers for p in layer.parameters()]
    assert len(owners) == len(set(owners))


@pytest.mark.parametrize(
    ("operations", "words"),
    [
        ([MergeLayers(first=4, last=6)], "names layer 6"),
        ([DropLayers(indices=(9,))], "names layer 9"),
        (
            [MergeLayers(first=1, last=3), DropLayers(indices=(3,))],
            "uses the attention of layer 3 twice",
        ),
        ([DropLayers(indices=tuple(range(6)))], "removes every layer"),
    ],
)
def test_contradictory_operations_change_nothing(
    operations: list[MergeLayers | DropLayers], words: str
) -> None:
    """Overlaps and layers that are not there are refused before the model changes."""
    model = make_model()
    layers = list(model.model.layers)
    with pytest.raises(PlanError, match=words):
        apply_layers(model, operations)
    assert list(model.model.layers) == layers
    assert model.config.num_hidden_layers == 6


@pytest.mark.parametrize("alike", [True, False])
def test_telescoping_is_deletion_but_for_the_norms(family: str, alike: bool) -> None:
    """With all norm gains 1 the run's lower layers are simply gone; with others they are not."""
    merged, deleted = make_model(family), make_model(family)
    for model in (merged, deleted):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if alike and "layernorm" in name:
                    parameter.fill_(1.0)
    deleted.model.layers = torch.nn.ModuleList(
        layer for i, layer in enumerate(deleted.model.layers) if i not in (1, 2)
    )
    apply_layers(merged, [MergeLayers(first=1, last=3, rule="telescoped")])
    tokens = random_tokens()
    with torch.no_grad():
        same = torch.allclose(merged(tokens).logits, deleted(tokens).logits, atol=1e-5)
    assert same == alike
