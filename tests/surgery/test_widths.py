"""Layers that keep different numbers of MLP channels."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

pytest.importorskip("torch_pruning")

from slm_plugin.errors import PlanError, UnsupportedModelError
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import DropLayers, KeepChannels
from slm_plugin.surgery import apply_operations
from slm_plugin.surgery.channels import apply_channels
from slm_plugin.surgery.portability import portability
from tests.tiny import FAMILIES, SMOLLM2, make_model, random_tokens

# Of 48; the third layer keeps all of them.
WIDTHS = (16, 40, 48)
TOKENS = random_tokens(2, 12)
CUTTABLE = [name for name, (record, _) in FAMILIES.items() if "channels" in record.units]


def kept(widths: tuple[int, ...] = WIDTHS) -> list[KeepChannels]:
    """Other channels in every layer, in no order."""
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3)).tolist()
    return [
        KeepChannels(layer=layer, indices=tuple(order[layer:] + order[:layer])[:width])
        for layer, width in enumerate(widths)
    ]


def logits(model: PreTrainedModel) -> torch.Tensor:
    """Of all tokens."""
    with torch.no_grad():
        found: torch.Tensor = model(TOKENS, use_cache=False).logits
    return found


@pytest.mark.parametrize("family", CUTTABLE)
def test_slicing_equals_silencing(family: str) -> None:
    """Each layer computes what the whole one does with the removed channels set to zero."""
    model = make_model(family, num_hidden_layers=3)
    masked, view = copy.deepcopy(model), DecoderView.of(model)
    before = view.dimensions()
    apply_channels(model, kept())
    for layer, operation in zip(DecoderView.of(masked).layers, kept(), strict=True):
        gone = sorted(set(range(48)) - set(operation.indices))
        with torch.no_grad():
            view.projections(layer)["down_proj"].weight[:, gone] = 0
    torch.testing.assert_close(logits(model), logits(masked), rtol=1e-4, atol=1e-5)
    after = view.dimensions()
    assert after == before.with_widths(WIDTHS)
    assert after.layer_widths == WIDTHS and after.intermediate_size == 48
    assert after.parameters == sum(p.numel() for p in model.parameters())
    assert view.config.intermediate_size == 48


def test_widths_can_be_cut_again_and_become_even() -> None:
    """The second cut sees each layer's own width; equal widths are no list any more."""
    model = make_model(num_hidden_layers=3)
    before = DecoderView.of(model).dimensions()
    apply_channels(model, kept())
    with pytest.raises(PlanError, match=r"layer 0: .* channels 0 to 15"):
        apply_channels(model, kept((8, 8, 8)))
    apply_channels(
        model, [KeepChannels(layer=layer, indices=tuple(range(16))) for layer in range(3)]
    )
    assert DecoderView.of(model).dimensions() == before.without_units(channels=32)


def test_other_differences_are_no_decoder() -> None:
    """A layer whose gate is narrower than its up projection, or whose heads are fewer."""
    for path, rows in (("mlp.gate_proj", 40), ("self_attn.k_proj", 8)):
        model = make_model(num_hidden_layers=3)
        linear = model.model.layers[1].get_submodule(path)
        linear.weight = torch.nn.Parameter(linear.weight[:rows])
        with pytest.raises(UnsupportedModelError, match="layer 1 differs in shape from layer 0"):
            DecoderView.of(model).dimensions()


def test_layers_of_different_widths_are_not_dropped() -> None:
    """One line, and nothing has changed."""
    model = make_model(num_hidden_layers=3)
    apply_channels(model, kept())
    with pytest.raises(PlanError, match="layers of 16 to 48 MLP channels are neither dropped nor"):
        apply_operations(model, [DropLayers(indices=(1,))])
    assert len(model.model.layers) == 3


def test_a_stock_load_refuses_what_plain_saving_writes(tmp_path: Path) -> None:
    """The config has one width; whoever saves without the exporter gets no wrong model from it."""
    model = make_model(num_hidden_layers=3)
    apply_channels(model, kept())
    model.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match=r"size mismatch|ignore_mismatched_sizes"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_the_warning_counts_the_padding() -> None:
    """Stated when the plan is made, with the parameters that a stock checkpoint has."""
    widths = [1536] * 10 + [1000] * 20
    after = SMOLLM2.with_widths(widths)
    config = make_model().config
    (warning,) = portability(SMOLLM2, after, config)
    zeros = 20 * 536 * 3 * 576
    assert f"with {zeros:,} zeros" in warning and "1,000 to 1,536" in warning
    assert f"{SMOLLM2.parameters:,} parameters in place of {after.parameters:,}" in warning
    assert not portability(SMOLLM2, SMOLLM2.with_widths([1024] * 30), config)
