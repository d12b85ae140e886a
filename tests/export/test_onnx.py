"""Tests of slm_plugin.export.onnx and ort_heads that need neither Optimum nor ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from slm_plugin import extras
from slm_plugin.errors import MissingExtraError
from slm_plugin.export.onnx import OnnxExporter, OnnxOptions
from slm_plugin.export.ort_heads import load_ort_model
from slm_plugin.session import Session
from tests.tiny import make_model


@pytest.fixture
def without_optimum(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation without the onnx extra."""
    monkeypatch.setattr(extras, "found_version", lambda _: None)


@pytest.mark.usefixtures("without_optimum")
def test_the_exporter_names_the_missing_extra(tmp_path: Path) -> None:
    """The hint is the command that installs it, and nothing is written."""
    with pytest.raises(MissingExtraError, match=r"pip install 'slm-plugin\[onnx\]'"):
        OnnxExporter(OnnxOptions()).export(Session(make_model()), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("without_optimum")
def test_the_reader_names_the_missing_extra(tmp_path: Path) -> None:
    """Opening a folder asks for the same packages."""
    with pytest.raises(MissingExtraError, match=r"load_ort_model needs optimum"):
        load_ort_model(tmp_path)


@pytest.mark.parametrize("wrong", [{"opset": 9}, {"tolerance": 0}, {"task": "fill-mask"}])
def test_options_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    """Before any model is loaded."""
    with pytest.raises(ValidationError):
        OnnxOptions.model_validate(wrong)
