"""Generation settings: read from where transformers reads them, written where both take them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slm_plugin.errors import ModelSourceError
from slm_plugin.export.checkpoint import save_checkpoint
from slm_plugin.models.generation import without_generation
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.session import Session
from tests.tiny import make_model

SETTINGS = {"temperature": 0.7, "num_beams": 4, "repetition_penalty": 1.2}


def edit(folder: Path, **fields: Any) -> None:
    """Change fields of a config."""
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields), encoding="utf-8")


@pytest.mark.parametrize("own_file", [False, True])
def test_settings_in_the_config_move_to_their_file(tmp_path: Path, own_file: bool) -> None:
    """As transformers reads them: a file of their own hides those in the config."""
    folder, written = tmp_path / "m", tmp_path / "out"
    make_model().save_pretrained(folder)
    edit(folder, **SETTINGS)
    if not own_file:
        (folder / "generation_config.json").unlink()
    model, _ = load(ModelSource(id=str(folder), device="cpu"))
    assert (model.generation_config.num_beams == 4) != own_file
    written.mkdir()
    save_checkpoint(Session(model), written)
    config = json.loads((written / "config.json").read_text())
    generation = json.loads((written / "generation_config.json").read_text())
    assert not SETTINGS.keys() & config.keys()
    expected = {} if own_file else SETTINGS
    assert {n: v for n, v in generation.items() if n in SETTINGS} == expected


def test_settings_that_a_caller_left_in_the_config_are_moved() -> None:
    """A model in memory keeps its own config; what is written has neither loss nor doubles."""
    model = make_model()
    model.config.temperature = 0.7
    model.config.num_beams = 4
    model.generation_config.num_beams = 2
    config, generation = without_generation(model)
    assert "temperature" not in config.to_dict()
    assert (generation.temperature, generation.num_beams) == (0.7, 2)
    assert model.config.temperature == 0.7 and model.generation_config.num_beams == 2


@pytest.mark.parametrize("content", ["[]", "{", '{"validate": 1}', '{"early_stopping": "maybe"}'])
def test_malformed_settings_are_one_line(tmp_path: Path, content: str) -> None:
    """Before any weight is read."""
    make_model().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(ModelSourceError):
        load(ModelSource(id=str(tmp_path), device="cpu"))


@pytest.mark.parametrize("tied", [True, False])
def test_the_tied_flag_is_what_the_model_does(tmp_path: Path, tied: bool) -> None:
    """A flag that says otherwise is corrected in what is written, and the head is stored or not."""
    model = make_model(tie_word_embeddings=tied)
    model.config.tie_word_embeddings = not tied
    save_checkpoint(Session(model), tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is tied
    found, _ = load(ModelSource(id=str(tmp_path), device="cpu"))
    assert (found.lm_head.weight is found.model.embed_tokens.weight) is tied
