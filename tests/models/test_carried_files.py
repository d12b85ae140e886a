"""Licences go with whatever is made of a model; processors have tests with their families."""

from __future__ import annotations

from pathlib import Path

import pytest

from slm_plugin.export.checkpoint import CheckpointExporter
from slm_plugin.models.carried_files import LICENCE, read_carried
from slm_plugin.models.families.llama import LLAMA
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.session import Session
from tests.tiny import make_checkpoint


@pytest.mark.parametrize("memory", ["whole", "layerwise"])
def test_a_licence_goes_with_the_checkpoint(tmp_path: Path, memory: str, reload_here: None) -> None:
    """Byte for byte, and nothing else that lies beside the weights."""
    source = make_checkpoint(tmp_path / "source")
    (source / "NOTICE.md").write_bytes(b"\xff no UTF-8\r\n")
    (source / "GEMMA_TERMS.html").write_text("<p>terms</p>")
    for other in ("README.md", "notes.txt", "preprocessor_config.json"):
        (source / other).write_text("{")
    (source / "license").mkdir()
    (source / "LICENSE.link").symlink_to("/etc/hostname")
    model, tokenizer = load(ModelSource(id=str(source), memory=memory))  # type: ignore[arg-type]
    session = Session(model, tokenizer)
    session.export(CheckpointExporter(CheckpointExporter.Options()), tmp_path)
    folder = tmp_path / "checkpoint"
    assert (folder / "NOTICE.md").read_bytes() == b"\xff no UTF-8\r\n"
    assert (folder / "GEMMA_TERMS.html").read_text() == "<p>terms</p>"
    for other in ("README.md", "notes.txt", "preprocessor_config.json", "license", "LICENSE.link"):
        assert not (folder / other).exists()


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("LICENSE", True),
        ("License.txt", True),
        ("LICENCE.md", True),
        ("NOTICE", True),
        ("USE_POLICY.md", True),
        ("COPYING", True),
        ("GEMMA_TERMS.html", True),
        ("MODEL_LICENSE", True),
        ("THIRD_PARTY_NOTICES.txt", True),
        ("Tongyi Qianwen LICENSE AGREEMENT", True),
        ("license_check.py", False),
        ("license.json", False),
        ("config.json", False),
        ("model.safetensors", False),
        ("README.md", False),
    ],
)
def test_licences_are_known_by_their_names(tmp_path: Path, name: str, is_one: bool) -> None:
    """As publishers call them."""
    (tmp_path / name).write_text("x")
    assert bool(LICENCE.fullmatch(name)) == is_one
    assert (name in read_carried(tmp_path, LLAMA)) == is_one
