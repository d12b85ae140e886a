"""Checkpoints of streamed models against those of the same models in memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from slm_plugin.errors import VerificationError
from slm_plugin.export import layerwise
from slm_plugin.export.checkpoint import (
    CheckpointExporter,
    CheckpointOptions,
    save_checkpoint,
    verify_checkpoint,
)
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.models.streaming import is_streamed
from slm_plugin.plans import DropLayers, MergeLayers
from slm_plugin.session import Session
from slm_plugin.surgery.layers import apply_layers
from tests.tiny import make_model, make_tokenizer

FIVE = int(transformers.__version__.split(".")[0]) >= 5
SMALL = {"hidden_size": 48, "head_dim": 8, "num_hidden_layers": 5}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a folder."""
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


def session_of(folder: Path, memory: str = "layerwise", rule: str = "telescoped") -> Session:
    """A checkpoint with two layers merged and one dropped."""
    source = ModelSource(id=str(folder), device="cpu", memory=memory)  # type: ignore[arg-type]
    model, tokenizer = load(source)
    apply_layers(model, [MergeLayers(first=1, last=3, rule=rule), DropLayers(indices=(0,))])
    return Session(model, tokenizer)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("rule", ["telescoped", "mean"])
@pytest.mark.parametrize("shard", ["5GB", "30KB"])
def test_the_files_are_the_same_bytes(
    tmp_path: Path, family: str, tied: bool, rule: str, shard: str
) -> None:
    """Weights, index and configs, in one file or several, whatever the model's number format."""
    dtype = torch.float32 if tied else torch.bfloat16
    model = make_model(family, tie_word_embeddings=tied, **SMALL).to(dtype)
    model.save_pretrained(tmp_path / "model")
    for memory in ("whole", "layerwise"):
        (tmp_path / memory).mkdir()
        session = session_of(tmp_path / "model", memory, rule)
        save_checkpoint(session, tmp_path / memory, max_shard_size=shard)
    whole, streamed = (tensors_of(tmp_path / memory) for memory in ("whole", "layerwise"))
    assert whole.keys() == streamed.keys()
    assert all(torch.equal(whole[name], streamed[name]) for name in whole)
    sizes = [file.stat().st_size for file in (tmp_path / "layerwise").glob("*.safetensors")]
    assert len(sizes) == 1 or max(sizes) < 33_000
    names = {file.name for file in (tmp_path / "whole").iterdir()}
    # transformers 5 sorts the weights before it cuts them into files.
    if FIVE and shard == "30KB":
        return
    assert names == {file.name for file in (tmp_path / "layerwise").iterdir()}
    assert ("model.safetensors.index.json" in names) == (shard == "30KB")
    for name in names:
        found = (tmp_path / "layerwise" / name).read_bytes()
        assert found == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.process
def test_a_fresh_process_reads_it_layer_by_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record says what was compared and that nothing was generated; the model stays out."""
    # As many threads as here: another number sums in another order.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    make_model(**SMALL).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    session = session_of(tmp_path / "model")
    record = CheckpointExporter(CheckpointOptions()).export(session, tmp_path / "out")
    assert {check.name: check.value for check in record.checks} == {
        layerwise.LOGITS: 0,
        "difference in parameters": 0,
        "other SHA-256 of all weights": 0,
        "sentences encoded otherwise": 0,
    }
    assert record.checks[0].tolerance > 0
    assert all(is_streamed(layer) for layer in session.model.model.layers)
    assert [entry.name for entry in (tmp_path / "out").iterdir()] == ["checkpoint"]


def test_the_logits_are_those_of_a_forward(tmp_path: Path, family: str) -> None:
    """Layer by layer or through the model's own forward: the same numbers."""
    make_model(family, tie_word_embeddings=False, **SMALL).save_pretrained(tmp_path / "model")
    session = session_of(tmp_path / "model")
    reference = layerwise.streamed_reference(session)
    for prompt, logits in zip(reference.prompts, reference.logits, strict=True):
        torch.testing.assert_close(logits, session.model(prompt).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        (
            "lm_head.weight",
            lambda t: t * 1.5,
            r"largest logit difference, layer by layer .*; other",
        ),
        ("model.embed_tokens.weight", lambda t: t + 1e-7 * (t == t[:1]), "other SHA-256"),
        ("model.layers.1.mlp.up_proj.weight", lambda t: None, "lacks 1 weight that"),
        ("model.layers.1.mlp.up_proj.weight", lambda t: t[:3], r"is \[3, 48\] instead of"),
    ],
)
def test_damage_is_seen(tmp_path: Path, name: str, change: object, words: str) -> None:
    """A changed, missing or misshapen weight fails the verification in one sentence."""
    make_model(**SMALL).save_pretrained(tmp_path / "model")
    session = session_of(tmp_path / "model")
    folder = tmp_path / "out"
    folder.mkdir()
    save_checkpoint(session, folder)
    assert verify_checkpoint(session, folder)
    tensors = load_file(folder / "model.safetensors")
    changed = change(tensors.pop(name))  # type: ignore[operator]
    if changed is not None:
        tensors[name] = changed.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=words) as caught:
        verify_checkpoint(session, folder)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("reload_here")
def test_weights_that_belong_to_nothing_are_seen(tmp_path: Path) -> None:
    """A config with fewer layers than the files hold does not pass."""
    make_model(**SMALL).save_pretrained(tmp_path / "model")
    session = session_of(tmp_path / "model")
    folder = tmp_path / "out"
    folder.mkdir()
    save_checkpoint(session, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(VerificationError, match=r"does not account for: model.layers.9"):
        verify_checkpoint(session, folder)


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that was read is still alive when the next tensor is read."""
    import weakref

    make_model(**SMALL).save_pretrained(tmp_path / "model")
    session = session_of(tmp_path / "model")
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    def noted(parameter: torch.Tensor) -> torch.Tensor:
        nonlocal most
        read = values(parameter)
        if parameter.device.type == "meta":
            alive.append(weakref.ref(read))
        most = max(most, sum(ref() is not None for ref in alive))
        return read

    values = layerwise.values
    monkeypatch.setattr(layerwise, "values", noted)
    (tmp_path / "out").mkdir()
    save_checkpoint(session, tmp_path / "out")
    assert len(alive) == 2 * 9 + 1
    assert most == 1


def test_a_failed_writing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that dies between two shards leaves no folder."""
    make_model(**SMALL).save_pretrained(tmp_path / "model")
    session = session_of(tmp_path / "model")
    written = []

    def second_fails(file: Path, *rest: object) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(file)
        file.write_bytes(b"half")

    monkeypatch.setattr(layerwise, "write_tensors", second_fails)
    with pytest.raises(KeyboardInterrupt):
        CheckpointExporter(CheckpointOptions(max_shard_size="30KB")).export(
            session, tmp_path / "out"
        )
    assert written
    assert not list((tmp_path / "out").iterdir())
