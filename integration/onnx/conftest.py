"""Pruned tiny models and one exported folder that several tests read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slm_plugin.export.onnx import OnnxExporter, OnnxOptions
from slm_plugin.plans import DropLayers
from slm_plugin.session import Session
from slm_plugin.surgery.layers import apply_layers
from tests.tiny import FAMILIES, make_model, make_tokenizer


def pruned_session(family: str = "llama", **settings: Any) -> Session:
    """A model that lost two layers of five, and whose head size is not hidden size over heads."""
    sizes = {"hidden_size": 48, "head_dim": 8, "num_hidden_layers": 5}
    if not FAMILIES[family][0].own_head_dim:
        sizes["head_dim"] = 12
    model = make_model(family, **{**sizes, **settings})
    apply_layers(model, [DropLayers(indices=(2, 3))])
    return Session(model, make_tokenizer())


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, Path]:
    """A pruned Llama and the folder with its ONNX graph; copy the folder before changing it."""
    session = pruned_session()
    output = tmp_path_factory.mktemp("run")
    OnnxExporter(OnnxOptions()).export(session, output)
    return session, output / "onnx"
