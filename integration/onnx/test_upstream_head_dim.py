"""Watches the fault of optimum-onnx that `slm_plugin.export.ort_heads` works around."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slm_plugin.export.ort_heads import load_ort_model
from slm_plugin.session import Session

pytest.importorskip("optimum.onnxruntime", exc_type=ImportError)
IDS = torch.tensor([[5, 6, 7, 8]])


@pytest.mark.filterwarnings("ignore")
def test_stock_class_still_guesses_the_head_size(exported: tuple[Session, Path]) -> None:
    """When this fails, optimum-onnx has mended it: `ort_heads` may go, with its documentation."""
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(exported[1])
    with pytest.raises(Exception, match="Got: 12 Expected: 8"):
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS))


@torch.no_grad()
def test_one_line_mends_the_stock_class(exported: tuple[Session, Path]) -> None:
    """What the documentation tells users who do not have this package."""
    from optimum.onnxruntime import ORTModelForCausalLM

    session, folder = exported
    model = ORTModelForCausalLM.from_pretrained(folder)
    model.embed_size_per_head = model.config.head_dim
    found = model(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(found, session.model(IDS).logits, atol=1e-4, rtol=0)


def test_heads_and_size_are_those_of_the_graph(exported: tuple[Session, Path]) -> None:
    """Not those of the config, which may even be wrong about them."""
    model = load_ort_model(exported[1])
    assert (model.num_key_value_heads, model.embed_size_per_head) == (2, 8)
