"""Tests of slm_plugin.export.checkpoint and of the reload program that it runs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from slm_plugin.errors import OutputError, VerificationError
from slm_plugin.export.checkpoint import (
    CheckpointExporter,
    CheckpointOptions,
    save_checkpoint,
    verify_checkpoint,
)
from slm_plugin.session import Session
from tests.tiny import make_model, make_tokenizer

FIVE = int(transformers.__version__.split(".")[0]) >= 5
SMALL = {"hidden_size": 48, "num_hidden_layers": 2, "head_dim": 8}


def edit_config(folder: Path, **changes: Any) -> None:
    """Change fields of a saved config; None removes one."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text(encoding="utf-8")), **changes}
    kept = {name: value for name, value in config.items() if value is not None}
    file.write_text(json.dumps(kept), encoding="utf-8")


def edit_weights(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the saved weights."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    edit(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def saved(folder: Path, **settings: Any) -> Session:
    """A session whose model, without tokenizer, is saved in a folder."""
    session = Session(make_model(**{**SMALL, **settings}))
    save_checkpoint(session, folder)
    return session


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize("tied", [True, False])
def test_every_family_reloads_exactly(tmp_path: Path, family: str, tied: bool) -> None:
    """Logits, weights and both kinds of generation are equal; hidden / heads is not head_dim."""
    model = make_model(family, tie_word_embeddings=tied, **SMALL)
    record = CheckpointExporter(CheckpointOptions()).export(Session(model), tmp_path)
    assert record.folder == "checkpoint"
    assert [check.value for check in record.checks] == [0] * 5
    assert record.checks[0].tolerance > 0
    written = sum(file.stat().st_size for file in (tmp_path / "checkpoint").iterdir())
    assert record.size_bytes == written


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_narrow_format_is_kept(tmp_path: Path, dtype: torch.dtype) -> None:
    """The checkpoint has the model's number format, and is compared in it."""
    saved(tmp_path / "wide")
    # Casting the module would cast the rotary frequencies as well, which no loader does.
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "wide", dtype=dtype)
    session = Session(model)
    save_checkpoint(session, tmp_path)
    assert load_file(tmp_path / "model.safetensors")["lm_head.weight"].dtype == dtype
    checks = verify_checkpoint(session, tmp_path)
    assert max(check.value for check in checks) == 0
    assert checks[0].tolerance > 1e-2


@pytest.mark.usefixtures("reload_here")
def test_sliding_layers_reload(tmp_path: Path) -> None:
    """Per-layer attention types are saved and the window is shorter than a prompt."""
    session = saved(
        tmp_path,
        family="qwen2",
        num_hidden_layers=3,
        use_sliding_window=True,
        sliding_window=6,
        max_window_layers=1,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
    )
    assert verify_checkpoint(session, tmp_path)
    edit_config(tmp_path, layer_types=["full_attention"] * 3)
    with pytest.raises(VerificationError, match="largest logit difference"):
        verify_checkpoint(session, tmp_path)


@pytest.mark.process
def test_a_fresh_process_proves_the_whole_folder(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Tokenizer, chat template and generation config lie beside the weights, proved outside.

    Neither process writes on standard output.
    """
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ messages }}"
    model = make_model(**SMALL)
    model.generation_config.max_new_tokens = 77
    record = CheckpointExporter(CheckpointOptions()).export(Session(model, tokenizer), tmp_path)
    assert [check.unit for check in record.checks] == [
        "logits",
        "prompts",
        "prompts",
        "parameters",
        "hashes",
        "sentences",
    ]
    folder = tmp_path / "checkpoint"
    found = transformers.AutoTokenizer.from_pretrained(folder)
    assert found.chat_template == "{{ messages }}"
    generation = json.loads((folder / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["max_new_tokens"] == 77
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint"]
    assert capfd.readouterr().out == ""


@pytest.mark.usefixtures("reload_here")
def test_a_corrupt_weight_is_measured(tmp_path: Path) -> None:
    """Half as much again in the head moves the largest logit by half of itself."""
    from slm_plugin.export.parity import reference

    session = saved(tmp_path)
    edit_weights(tmp_path, lambda tensors: tensors["lm_head.weight"].mul_(1.5))
    with pytest.raises(VerificationError, match="other SHA-256 of all weights 1") as caught:
        verify_checkpoint(session, tmp_path)
    figure = float(str(caught.value).split("difference ")[1].split(",")[0])
    assert figure == pytest.approx(reference(session).scale / 2, rel=1e-3)


@pytest.mark.usefixtures("reload_here")
def test_one_changed_bit_is_seen(tmp_path: Path) -> None:
    """The hash sees what no prompt touches: the embedding of a token that is never asked."""
    session = saved(tmp_path, vocab_size=4096)

    def nudge(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.embed_tokens.weight"][4000, 0] += 1e-3

    edit_weights(tmp_path, nudge)
    with pytest.raises(VerificationError, match=r": other SHA-256 of all weights 1, allowed 0$"):
        verify_checkpoint(session, tmp_path)


@pytest.mark.usefixtures("reload_here")
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_key_value_heads": 4}, "do not have the shape that config.json asks for, first"),
        ({"num_hidden_layers": 3}, "weights are missing, first model.layers.2"),
        ({"num_hidden_layers": 1}, "belong to nothing that config.json describes"),
        ({"model_type": "no-such"}, "ValueError"),
    ],
)
def test_a_wrong_config_is_named_in_one_line(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """What does not fit is counted and the first one named."""
    session = saved(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(VerificationError, match="does not load with stock") as caught:
        verify_checkpoint(session, tmp_path)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.usefixtures("reload_here")
def test_a_lost_rope_theta_is_measured(tmp_path: Path) -> None:
    """The weights fit and load; only the logits tell."""
    theta = 100.0
    rope = {"rope_parameters": {"rope_theta": theta, "rope_type": "default"}}
    session = saved(tmp_path, **(rope if FIVE else {"rope_theta": theta}))
    assert verify_checkpoint(session, tmp_path)
    edit_config(tmp_path, rope_theta=None, rope_parameters=None)
    with pytest.raises(VerificationError, match="largest logit difference"):
        verify_checkpoint(session, tmp_path)


def test_a_dead_process_is_a_failed_verification(tmp_path: Path) -> None:
    """An interpreter without the package cannot vouch for anything."""
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\necho no module >&2\nexit 3\n", encoding="utf-8")
    script.chmod(0o755)
    session = saved(tmp_path / "checkpoint")
    with pytest.raises(VerificationError, match="ended with code 3: no module"):
        verify_checkpoint(session, tmp_path / "checkpoint", python=str(script))


@pytest.mark.usefixtures("reload_here")
def test_a_replaced_tokenizer_is_seen(tmp_path: Path) -> None:
    """Transformers 5 loads Qwen2Tokenizer for a qwen2 model whatever the folder holds."""
    session = Session(make_model("qwen2", **SMALL), make_tokenizer())
    save_checkpoint(session, tmp_path)
    if FIVE:
        with pytest.raises(VerificationError, match="encodes 3 sentences otherwise"):
            verify_checkpoint(session, tmp_path)
    else:
        assert verify_checkpoint(session, tmp_path)


def test_the_config_is_cleaned_and_the_session_is_not_touched(tmp_path: Path) -> None:
    """No quantisation leftovers and no path; head_dim is written where the class has none."""
    model = make_model("qwen2", **{**SMALL, "head_dim": 12})
    del model.config.head_dim
    model.config.quantization_config = {"quant_method": "gguf"}
    model.config._name_or_path = "/home/me/model.gguf"
    before = model.config.to_dict()
    save_checkpoint(Session(model), tmp_path)
    written = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert written["head_dim"] == 12
    assert "quantization_config" not in written
    assert "/home/me" not in "".join(
        file.read_text(encoding="utf-8") for file in tmp_path.glob("*.json")
    )
    assert model.config.to_dict() == before


def test_generation_settings_are_saved_as_they_are(tmp_path: Path) -> None:
    """A temperature without sampling, which save_pretrained refuses, ends no run."""
    session = Session(make_model(**SMALL))
    session.model.generation_config.temperature = 0.6
    own = session.model.generation_config
    save_checkpoint(session, tmp_path)
    written = json.loads((tmp_path / "generation_config.json").read_text(encoding="utf-8"))
    assert written["temperature"] == 0.6
    assert session.model.generation_config is own
    transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.usefixtures("reload_here")
def test_shards_are_no_larger_than_asked(tmp_path: Path) -> None:
    """A small shard size gives several files that load together."""
    session = Session(make_model(**SMALL))
    save_checkpoint(session, tmp_path, max_shard_size="60KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 2
    assert max(shard.stat().st_size for shard in shards) < 64_000
    assert verify_checkpoint(session, tmp_path)


def test_a_folder_that_exists_is_refused(tmp_path: Path) -> None:
    """Nothing is overwritten."""
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "mine.txt").write_text("precious", encoding="utf-8")
    with pytest.raises(OutputError, match="exists"):
        CheckpointExporter(CheckpointOptions()).export(Session(make_model(**SMALL)), tmp_path)
    assert (tmp_path / "checkpoint" / "mine.txt").read_text(encoding="utf-8") == "precious"


def test_a_failed_verification_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint that is not proved does not appear."""
    monkeypatch.setattr(
        "slm_plugin.export.checkpoint.verify_checkpoint",
        lambda session, folder: verify_checkpoint(session, folder, python="/bin/false"),
    )
    with pytest.raises(VerificationError, match="ended with code 1"):
        CheckpointExporter(CheckpointOptions()).export(Session(make_model(**SMALL)), tmp_path)
    assert not list(tmp_path.iterdir())
