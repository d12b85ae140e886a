"""Pruned tiny models and one exported folder that several tests read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

from slm_plugin.export.onnx import OnnxExporter, OnnxOptions
from slm_plugin.session import Session
from tests.conftest import make_model, make_tokenizer


def pruned_session(family: str = "llama", **settings: Any) -> Session:
    """A model that lost two layers of five, and whose head size is not hidden size over heads."""
    model = make_model(
        family, **{"hidden_size": 48, "head_dim": 8, "num_hidden_layers": 5, **settings}
    )
    kept = [0, 1, 4]
    model.model.layers = nn.ModuleList(model.model.layers[index] for index in kept)
    for index, layer in enumerate(model.model.layers):
        layer.self_attn.layer_idx = index
    if hasattr(model.config, "layer_types"):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]
    model.config.num_hidden_layers = len(kept)
    return Session(model, make_tokenizer())


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, Path]:
    """A pruned Llama and the folder with its ONNX graph; copy the folder before changing it."""
    session = pruned_session()
    output = tmp_path_factory.mktemp("run")
    OnnxExporter(OnnxOptions()).export(session, output)
    return session, output / "onnx"
