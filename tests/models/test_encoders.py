"""Checkpoints of encoders: what a class lacks or a config says is told, and nothing is made up."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from slm_plugin.api import list_pruners, prune
from slm_plugin.errors import SlmError
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.preparation import InMemory, prepare
from slm_plugin.recipe import Recipe
from slm_plugin.surgery.layers import apply_layers
from tests.encoders import make_encoder, make_inputs, stack_of
from tests.tiny import command


def saved(folder: Path, name: str, head: str | None = None, **settings: Any) -> Path:
    """A tiny encoder on disk."""
    make_encoder(name, head, **settings).eval().save_pretrained(folder)
    return folder


def changed(folder: Path, **fields: Any) -> None:
    """Other values in its config; None takes a field out."""
    file = folder / "config.json"
    content = json.loads(file.read_text()) | fields
    file.write_text(json.dumps({n: v for n, v in content.items() if v is not None}))


def stored(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Other weights in its file; None takes one out."""
    file = folder / "model.safetensors"
    content = load_file(file) | {n.replace("__", "."): t for n, t in tensors.items()}
    save_file({n: t for n, t in content.items() if t is not None}, file, metadata={"format": "pt"})


def loaded(folder: Path, stack: str | None = None) -> Any:
    """The model of a folder."""
    return load(ModelSource(id=str(folder), device="cpu", stack=stack))[0]  # type: ignore[arg-type]


def told(folder: Path, stack: str | None = None) -> str:
    """What a user reads about a folder, one line."""
    with pytest.raises(SlmError) as caught:
        loaded(folder, stack)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "fields", "words"),
    [
        ("bert", {"hidden_size": "32"}, "hidden_size"),
        ("bert", {"num_attention_heads": 5}, "no multiple"),
        ("bert", {"is_decoder": True}, "is_decoder"),
        ("bert", {"add_cross_attention": True}, "add_cross_attention"),
        ("bert", {"position_embedding_type": "relative_key"}, "position_embedding_type"),
        ("bert", {"quantization_config": {"quant_method": "x"}}, "quantised weights"),
        ("bert", {"architectures": ["BertLMHeadModel"]}, "BertLMHeadModel is not supported"),
        ("bert", {"architectures": ["BertForNothing"]}, "has no BertForNothing"),
        ("bert", {"model_type": "hubert"}, "contradicts itself"),
        ("bert", {"num_hidden_layers": 4}, "does not account for"),
        ("bert", {"num_hidden_layers": 6}, "fewer than its config requires"),
        ("bert", {"intermediate_size": 40}, "of another shape"),
        ("bert", {"from_pretrained": "x"}, "no setting of a model"),
        ("wav2vec2", {"use_weighted_layer_sum": True}, "use_weighted_layer_sum"),
        ("wav2vec2_stable", {"adapter_attn_dim": 4}, "adapter_attn_dim"),
        ("wav2vec2", {"conv_stride": [4]}, "does not take"),
        ("whisper_encoder", {"decoder_layers": 0}, "decoder_layers"),
        ("whisper_encoder", {"num_hidden_layers": 3}, "contradicts itself"),
    ],
)
def test_a_config_is_checked(name: str, fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    """In the words of its own family."""
    changed(saved(tmp_path, name), **fields)
    assert words in told(tmp_path, stack_of(name))


def test_a_model_in_memory_is_checked_as_well() -> None:
    """Its settings, and the modules of its layers."""
    model = make_encoder(
        "wav2vec2", "Wav2Vec2ForSequenceClassification", use_weighted_layer_sum=True
    )
    with pytest.raises(SlmError, match="use_weighted_layer_sum"):
        prune(model, None, "deepest", layers_removed=1)
    assert list_pruners(model) == []

    class Other(torch.nn.Linear):
        """As adapters and quantisation replace linear maps."""

    model = make_encoder("bert")
    model.bert.encoder.layer[2].intermediate.dense = Other(32, 48)
    with pytest.raises(SlmError, match=r"intermediate\.dense of layer 2 is a .*Other"):
        prune(model, None, "deepest", layers_removed=1)


@pytest.mark.parametrize("stack", [None, "encoder", "decoder"])
def test_a_stack_is_named_where_there_are_two(stack: Any, tmp_path: Path) -> None:
    """And nowhere else, by whatever door."""
    whisper, bert = saved(tmp_path / "w", "whisper_encoder"), saved(tmp_path / "b", "bert")
    model = make_encoder("whisper_encoder" if stack is None else "bert")
    words = "two stacks" if stack is None else "one stack of layers"
    folder = whisper if stack is None else bert
    assert words in told(folder, stack)
    for call in (
        lambda: prune(model, None, "deepest", layers_removed=1, stack=stack),
        lambda: apply_layers(model, [], stack),
        lambda: prepare(InMemory(model, stack=stack)),
        lambda: Recipe.from_dict({"model": {"id": str(folder), "stack": stack}}),
    ):
        with pytest.raises(SlmError, match=words):
            call()


def test_a_stack_of_a_decoder_is_refused() -> None:
    """A plain language model has one."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3, "vocab_size": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2))
    with pytest.raises(SlmError, match="one stack of layers"):
        prune(model, None, "deepest", layers_removed=1, stack="decoder")


def test_weights_are_complete_but_for_what_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As published checkpoints are: another head's weights, and what only training uses."""
    bert = saved(tmp_path / "bert", "bert")
    stored(bert, bert__pooler__dense__weight=torch.zeros(32, 32))
    assert type(loaded(bert)).__name__ == "BertForMaskedLM"
    assert "left out: bert.pooler.dense.weight" in capsys.readouterr().err
    wave = saved(tmp_path / "wave", "wav2vec2")
    stored(wave, wav2vec2__masked_spec_embed=None)
    first = loaded(wave)
    assert "which only training uses" in capsys.readouterr().err
    assert not first.wav2vec2.masked_spec_embed.any()
    stored(wave, lm_head__weight=None)
    assert "fewer than its config requires: lm_head.weight" in told(wave)


def test_weights_of_old_names_are_read(tmp_path: Path) -> None:
    """`weight_g` and `weight_v` of the convolution of positions."""
    folder, conv = saved(tmp_path, "wav2vec2"), "wav2vec2.encoder.pos_conv_embed.conv."
    wanted = loaded(folder).state_dict()
    tensors = load_file(folder / "model.safetensors")
    for old, new in (("weight_g", "original0"), ("weight_v", "original1")):
        tensors[f"{conv}{old}"] = tensors.pop(f"{conv}parametrizations.weight.{new}")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    found = loaded(folder).state_dict()
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_a_damaged_weight_is_told(tmp_path: Path) -> None:
    """NaN by the name of its tensor; pickles are not read at all."""
    folder = saved(tmp_path / "a", "hubert")
    stored(folder, lm_head__bias=torch.full((40,), float("nan")))
    assert "NaN or infinity in lm_head.bias" in told(folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "only safetensors are read" in told(folder)


def test_layers_are_not_read_one_by_one(tmp_path: Path) -> None:
    """`memory: layerwise` is for decoders, whose files this package reads itself."""
    saved(tmp_path, "bert")
    with pytest.raises(SlmError, match="cannot be read one at a time"):
        load(ModelSource(id=str(tmp_path), device="cpu", memory="layerwise"))


def test_other_commands_say_that_it_is_no_decoder(tmp_path: Path) -> None:
    """`analyze` and `compare`, in one line."""
    folder = saved(tmp_path / "model", "bert")
    found = command("analyze", str(folder), "--output", str(tmp_path / "out"))
    assert found.returncode == 2 and "of plain decoders" in found.stderr
    file = tmp_path / "compare.yaml"
    file.write_text(
        f"version: 1\nmodel: {{id: {folder}}}\nmethods:\n  - prune: deepest\n"
        f"targets: [{{layers_removed: 1}}]\noutput: {tmp_path / 'out'}\n"
    )
    found = command("validate", str(file))
    assert found.returncode == 2 and "comparisons are of plain decoders" in found.stderr


@pytest.mark.parametrize("name", ["wav2vec2", "conformer", "whisper_decoder"])
def test_inspect_and_list_show_it(name: str, tmp_path: Path) -> None:
    """Sizes that add up, and what works."""
    saved(tmp_path, name)
    chosen = () if stack_of(name) is None else ("--stack", str(stack_of(name)))
    found = json.loads(command("inspect", str(tmp_path), *chosen, "--json").stdout)
    assert sum(found["parameters"].values()) == found["dimensions"]["parameters"]
    assert all(value > 0 for value in found["parameters"].values())
    assert "block_influence" in command("list", "--model", str(tmp_path), *chosen).stdout
    if chosen:
        assert "two stacks" in command("inspect", str(tmp_path)).stderr


RECIPE = """\
version: 1
model: {id: model, stack: decoder}
calibration: {source: tensors, path: speech.safetensors}
stages:
  - prune: block_influence
    target: {layers_removed: 1}
export:
  - checkpoint
output: out
"""


@pytest.mark.process
def test_a_recipe_runs_from_the_files_to_the_proof(tmp_path: Path) -> None:
    """In processes of their own; the processor's files go along, but not what names code."""
    saved(tmp_path / "model", "whisper_decoder")
    (tmp_path / "model" / "preprocessor_config.json").write_text(
        '{"feature_size": 8, "auto_map": {"AutoProcessor": "code.Other"}}'
    )
    (tmp_path / "model" / "vocab.json").write_text('{"a": 0}')
    (tmp_path / "model" / "adapter.eng.safetensors").write_bytes(b"")
    save_file(make_inputs("whisper_decoder"), tmp_path / "speech.safetensors")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    run = [sys.executable, "-m", "slm_plugin"]
    done = subprocess.run(
        [*run, "run", "recipe.yaml"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "out" / "checkpoint"
    assert json.loads((folder / "preprocessor_config.json").read_text()) == {"feature_size": 8}
    assert (folder / "vocab.json").read_text() == '{"a": 0}'
    assert not (folder / "adapter.eng.safetensors").exists()
    config = json.loads((folder / "config.json").read_text())
    assert (config["encoder_layers"], config["decoder_layers"]) == (5, 3)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["calibration"]["source"] == "speech.safetensors"
    assert report["after"]["stack"] == "decoder"
    card = (tmp_path / "out" / "README.md").read_text()
    assert "WhisperForConditionalGeneration.from_pretrained" in card
    assert "text-generation" not in card and "KV cache" not in card
    # The plan knows its stack.
    plan = tmp_path / "out" / "plan-01-block_influence.json"
    found = command(
        "apply", str(plan), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "again")
    )
    assert found.returncode == 0, found.stderr
    written = tmp_path / "again" / "checkpoint" / "model.safetensors"
    assert written.read_bytes() == (folder / "model.safetensors").read_bytes()


def test_a_checkpoint_that_computes_something_else_is_told(
    tmp_path: Path, reload_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights are equal, but a setting of the config is not."""
    from slm_plugin.export import checkpoint

    model = make_encoder("wav2vec2", do_stable_layer_norm=False)
    found = prune(model, None, "deepest", layers_removed=1)
    mended = checkpoint.mend_config

    def mend(folder: Path, *given: Any, **named: Any) -> None:
        mended(folder, *given, **named)
        changed(folder, layer_norm_eps=0.1)

    monkeypatch.setattr(checkpoint, "mend_config", mend)
    with pytest.raises(SlmError, match="largest difference of an output"):
        found.save(str(tmp_path / "saved"))
    assert not (tmp_path / "saved").exists()
