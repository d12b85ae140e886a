"""Prompts beyond windows and beyond the positions of training, for checkpoints of both kinds."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from slm_plugin.errors import VerificationError
from slm_plugin.export.checkpoint import CheckpointExporter, CheckpointOptions, verify_checkpoint
from slm_plugin.export.lengths import (
    BEYOND,
    LONGEST,
    boundaries,
    depends_on_length,
    probe_length,
    rope_types,
    windows,
)
from slm_plugin.export.parity import logits_of, prompts
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.session import Session
from tests.export.test_checkpoint import edit_config, saved
from tests.tiny import make_model, random_tokens

FIVE = int(transformers.__version__.split(".")[0]) >= 5
FACTORS = [1.0, 1.5, 2.0, 3.0]
ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "longrope": {
        "factor": 4.0,
        "short_factor": FACTORS,
        "long_factor": FACTORS[::-1],
        "original_max_position_embeddings": 16,
    },
}


def scaled(kind: str) -> dict[str, Any]:
    """Settings of a model with this scaling, trained on 64 positions."""
    scaling = {"rope_type": kind, **ROPE[kind]}
    if FIVE:
        return {"rope_parameters": {"rope_theta": 500.0, **scaling}, "max_position_embeddings": 64}
    return {"rope_theta": 500.0, "rope_scaling": scaling, "max_position_embeddings": 64}


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize("memory", ["whole", "layerwise"])
@pytest.mark.parametrize("kind", sorted(ROPE))
def test_every_scaling_reloads_exactly(tmp_path: Path, kind: str, memory: str) -> None:
    """Beyond the boundary, too, and whatever was computed before: dynamic scaling remembers."""
    saved(tmp_path, num_hidden_layers=3, **scaled(kind))
    network, _ = load(ModelSource(id=str(tmp_path), device="cpu", memory=memory))  # type: ignore[arg-type]
    session = Session(network)
    logits_of(network, random_tokens(1, 100)) if memory == "whole" else None
    (tmp_path / "out").mkdir()
    record = CheckpointExporter(CheckpointOptions()).export(session, tmp_path / "out")
    assert max(check.value for check in record.checks) == 0
    assert max(prompt.shape[1] for prompt in prompts(session)) > 64


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_scaling_that_starts_later_is_found(tmp_path: Path, kind: str) -> None:
    """Without it a short text computes the same; the prompt beyond the boundary does not."""
    session = saved(tmp_path, **scaled(kind))
    assert verify_checkpoint(session, tmp_path)
    # Of longrope the longer factors alone are spoilt.
    changed = {"rope_type": "default"}
    if kind == "longrope":
        changed = {"rope_type": kind, **ROPE[kind], "long_factor": [1.0] * 4}
    both = {"rope_scaling": changed, "rope_parameters": {**changed, "rope_theta": 500.0}}
    edit_config(tmp_path, **(both if FIVE else {"rope_scaling": changed}))
    with pytest.raises(VerificationError, match="largest logit difference"):
        verify_checkpoint(session, tmp_path)


@pytest.mark.usefixtures("reload_here")
def test_a_lost_window_is_found(tmp_path: Path) -> None:
    """Though it is longer than every sentence."""
    session = saved(tmp_path, family="mistral", sliding_window=100, max_position_embeddings=4096)
    assert verify_checkpoint(session, tmp_path)
    edit_config(tmp_path, sliding_window=90)
    with pytest.raises(VerificationError, match="largest logit difference"):
        verify_checkpoint(session, tmp_path)


def test_the_last_prompt_goes_beyond_what_can_be_afforded() -> None:
    """Of boundaries the longest that is short enough; of huge ones, or huge logits, none."""
    assert prompts(Session(make_model()))[-1].shape[1] == 256 + BEYOND
    far = make_model(max_position_embeddings=LONGEST + 1)
    assert max(prompt.shape[1] for prompt in prompts(Session(far))) == 48
    near = make_model("mistral", max_position_embeddings=8192, sliding_window=20)
    assert prompts(Session(near))[-1].shape[1] == 20 + BEYOND
    assert probe_length(near.config, 10_000_000) is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, set()),
        ({"sliding_window": None}, set()),
        ({"sliding_window": 7}, {7}),
        ({"sliding_window": 7.0}, {7}),
        ({"sliding_window": 7, "use_sliding_window": False}, set()),
        ({"sliding_window": 7, "layer_types": ["full_attention"]}, set()),
        ({"sliding_window": 7, "layer_types": ["sliding_attention"]}, {7}),
        ({"sliding_window": 0}, set()),
        ({"sliding_window": "7"}, set()),
    ],
)
def test_windows_are_those_that_a_layer_has(config: dict[str, Any], expected: set[int]) -> None:
    """Whatever a config says of a window that is off."""
    assert windows(SimpleNamespace(**config)) == expected


@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_rotary_settings_are_read_in_all_their_forms(name: str) -> None:
    """One for all layers in the old words or the new, or one for each kind of layer."""
    kinds = {
        "sliding_attention": {"rope_type": "default"},
        "full_attention": {"rope_type": "dynamic", "original_max_position_embeddings": 9},
    }
    assert rope_types(SimpleNamespace(**{name: None})) == set()
    assert rope_types(SimpleNamespace(**{name: {"type": "yarn"}})) == {"yarn"}
    assert rope_types(SimpleNamespace(**{name: {"rope_theta": 5.0}})) == {"default"}
    nested = SimpleNamespace(**{name: kinds}, max_position_embeddings=20)
    assert rope_types(nested) == {"default", "dynamic"}
    assert depends_on_length(nested)
    assert boundaries(nested) == {9, 20}
    assert depends_on_length(SimpleNamespace(**{name: {"rope_type": "of next year"}}))


def test_the_reference_leaves_no_trace_of_its_long_prompt() -> None:
    """A short text computes the same before and after the check of a dynamic model."""
    session = Session(make_model(**scaled("dynamic")))
    ids = random_tokens(1, 70)
    before = logits_of(session.model, ids)
    logits_of(session.model, random_tokens(1, 200))
    assert torch.equal(logits_of(session.model, ids), before)
