"""What an ONNX graph computes beyond the length it was traced on, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from integration.onnx.conftest import pruned_session
from slm_plugin.errors import SlmError, UnsupportedModelError, VerificationError
from slm_plugin.export import lengths, onnx, rehearsal
from slm_plugin.export.onnx import OnnxExporter, OnnxOptions
from slm_plugin.export.ort_heads import load_ort_model
from slm_plugin.export.parity import logits_of, prompts
from slm_plugin.pipeline import run
from slm_plugin.recipe import Recipe
from slm_plugin.session import Session
from tests.tiny import make_model, make_tokenizer, random_tokens

pytest.importorskip("optimum.onnxruntime", exc_type=ImportError)

FACTORS = [1.0, 1.5, 2.0, 3.0]
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
STATIC: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "linear in the old words": {"type": "linear", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
    "llama3": {"rope_type": "llama3", **LLAMA3, "original_max_position_embeddings": 16},
}
MOVING: dict[str, dict[str, Any]] = {
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "dynamic in the old words": {"type": "dynamic", "factor": 4.0},
    "longrope": {
        "rope_type": "longrope",
        "factor": 4.0,
        "short_factor": FACTORS,
        "long_factor": FACTORS[::-1],
        "original_max_position_embeddings": 16,
    },
}
QWEN = {"use_sliding_window": True, "max_window_layers": 1}


def difference(session: Session, folder: Path, length: int) -> float:
    """Largest difference of a logit on a random text, as a share of the largest logit."""
    ids = random_tokens(1, length)
    mine, theirs = logits_of(session.model, ids), logits_of(load_ort_model(folder), ids)
    return float((mine - theirs).abs().max() / mine.abs().max())


@pytest.mark.parametrize("kind", sorted(STATIC))
def test_static_frequencies_hold_at_any_length(tmp_path: Path, kind: str) -> None:
    """Checked beyond the positions of training, and right at twice as many again."""
    session = pruned_session(rope_scaling=STATIC[kind], max_position_embeddings=64)
    assert max(p.shape[1] for p in prompts(session)) > 64
    OnnxExporter(OnnxOptions()).export(session, tmp_path)
    assert difference(session, tmp_path / "onnx", 200) < 1e-4


@pytest.mark.parametrize("kind", sorted(MOVING))
def test_frequencies_that_depend_on_the_length_are_refused(tmp_path: Path, kind: str) -> None:
    """With the scaling's name, and nothing is written."""
    session = pruned_session(rope_scaling=MOVING[kind], max_position_embeddings=64)
    with pytest.raises(UnsupportedModelError, match=f"scaling is {kind.split()[0]}, which depends"):
        OnnxExporter(OnnxOptions()).export(session, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", sorted(MOVING))
def test_the_check_alone_would_find_it(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the refusal, the prompt beyond the boundary shows that the graph is wrong."""
    monkeypatch.setattr(onnx, "refuse_length_dependent", lambda _: None)
    session = pruned_session(rope_scaling=MOVING[kind], max_position_embeddings=64)
    with pytest.raises(VerificationError, match="logit difference"):
        OnnxExporter(OnnxOptions()).export(session, tmp_path)


def test_a_run_refuses_before_any_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No layer is searched for and no folder appears for an export that cannot be."""
    model = make_model(rope_scaling=MOVING["dynamic"], max_position_embeddings=64)
    model.save_pretrained(tmp_path / "m")
    make_tokenizer().save_pretrained(tmp_path / "m")
    recipe = Recipe.parse(
        f"version: 1\nmodel: {{id: {tmp_path / 'm'}, device: cpu}}\n"
        "stages:\n  - {prune: deepest, target: {layers_removed: 1}}\n"
        f"export: [checkpoint, onnx]\noutput: {tmp_path / 'out'}\n"
    )
    with pytest.raises(UnsupportedModelError, match="dynamic"):
        run(recipe)
    assert "stage 1" not in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("mistral", {"sliding_window": 16}),
        ("mistral", {"sliding_window": 100}),
        ("qwen2", {**QWEN, "sliding_window": 16}),
        ("qwen3", {**QWEN, "sliding_window": 40}),
    ],
)
def test_windows_are_honoured(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    """In layers that have one, also for a window that is longer than any sentence."""
    session = pruned_session(family, **settings)
    OnnxExporter(OnnxOptions()).export(session, tmp_path)
    assert difference(session, tmp_path / "onnx", 300) < 1e-4


def without_window(checkpoint: Path, *rest: Any) -> None:
    """A fault planted in the exporter: the graph of a model whose window was forgotten."""
    import json

    file = checkpoint / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    whole = {"sliding_window": None, "use_sliding_window": False}
    if "layer_types" in config:
        whole["layer_types"] = ["full_attention"] * config["num_hidden_layers"]  # type: ignore[assignment]
    file.write_text(json.dumps({**config, **whole}), encoding="utf-8")
    WRITE(checkpoint, *rest)


WRITE = onnx.write_onnx


@pytest.mark.parametrize("window", [16, 100, 200])
@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_graph_without_its_window_is_found(
    tmp_path: Path, family: str, window: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The prompt goes beyond the window, whatever lies in between."""
    monkeypatch.setattr(onnx, "write_onnx", without_window)
    settings = {"sliding_window": window, **(QWEN if family == "qwen2" else {})}
    with pytest.raises(VerificationError, match="logit difference"):
        OnnxExporter(OnnxOptions()).export(pruned_session(family, **settings), tmp_path)


@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_a_window_too_long_to_read_is_rehearsed(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A tiny model of the class proves it, or the export is refused before anything is done."""
    settings = {"sliding_window": 4096, "max_position_embeddings": 32768}
    session = pruned_session(family, **settings, **(QWEN if family != "mistral" else {}))
    before = torch.get_rng_state()
    OnnxExporter(OnnxOptions()).check_model(session)
    assert "tiny model" in capsys.readouterr().err
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(onnx, "write_onnx", without_window)
    with pytest.raises(UnsupportedModelError, match="sliding window cannot be exported"):
        OnnxExporter(OnnxOptions()).check_model(session)


def test_what_nobody_needs_is_not_rehearsed(monkeypatch: pytest.MonkeyPatch) -> None:
    """No window, one that is off, or one that the prompts reach."""
    monkeypatch.setattr(onnx, "rehearse", lambda *_: pytest.fail("rehearsed"))
    for family, settings in (
        ("llama", {}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 300}),
        ("qwen2", {"use_sliding_window": False, "sliding_window": 4096}),
    ):
        OnnxExporter(OnnxOptions()).check_model(pruned_session(family, **settings))


def test_the_limit_is_where_the_prompts_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A large vocabulary shortens what can be read, so that rehearsal takes over there."""
    config = pruned_session("mistral", sliding_window=300).model.config
    assert not rehearsal.unproved_windows(config, 128)
    assert rehearsal.unproved_windows(config, 1_000_000) == {300}
    assert lengths.probe_length(config, 1_000_000) is None
    assert lengths.probe_length(config, 128) == 300 + lengths.BEYOND


def test_a_rehearsal_that_cannot_be_written_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Optimum cannot do is known before the stages, too."""

    def refuse(*_: Any) -> None:
        raise SlmError("Optimum cannot export the model to ONNX: no")

    monkeypatch.setattr(onnx, "write_onnx", refuse)
    with pytest.raises(UnsupportedModelError, match="Optimum cannot"):
        OnnxExporter(OnnxOptions()).check_model(pruned_session("mistral", sliding_window=4096))
