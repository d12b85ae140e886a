"""Models of images and text: what is read, what is written beside the text, what must stay."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from slm_plugin import prune
from slm_plugin.errors import CalibrationError, ModelSourceError, PlanError, SlmError, TargetError
from slm_plugin.export.checkpoint import CheckpointExporter
from slm_plugin.inspection import inspection
from slm_plugin.models.configuration import read_configuration
from slm_plugin.models.families.suitability import complaint
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.models.towers import common_name
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import DropLayers, DropSublayers, MergeLayers, PruningPlan
from slm_plugin.pruners.depth.depth_plan import kinds_of
from slm_plugin.recipe import Recipe
from slm_plugin.recovery.training.lora import _targets
from slm_plugin.registry import exporters, pruners
from slm_plugin.session import Session
from slm_plugin.surgery.layers import apply_layers
from slm_plugin.target import Target
from tests.tiny import AROUND, command, make_image, make_model, random_tokens

TOWERS = sorted(AROUND)
SECTIONS = {"rope_type": "default", "mrope_section": [2, 1, 1]}
# As the first ones were published: only what differs from the defaults of the classes.
GEMMA_4B = {
    "architectures": ["Gemma3ForConditionalGeneration"],
    "eos_token_id": [1, 106],
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "model_type": "gemma3_text",
        "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
        "sliding_window": 1024,
    },
    "torch_dtype": "bfloat16",
    "vision_config": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "model_type": "siglip_vision_model",
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
}
LLAVA_7B = {
    "architectures": ["LlavaForConditionalGeneration"],
    "image_token_index": 32000,
    "model_type": "llava",
    "text_config": {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "tie_word_embeddings": False,
    "vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 24},
}


@pytest.fixture(params=TOWERS)
def tower(request: pytest.FixtureRequest) -> str:
    """Every family of images and text in turn."""
    return str(request.param)


def answers(model: PreTrainedModel) -> torch.Tensor:
    """Logits of a text with an image."""
    with torch.no_grad():
        found: torch.Tensor = model(**make_image(model), use_cache=False).logits
    return found


def saved(folder: Path, family: str) -> PreTrainedModel:
    """A tiny model and its checkpoint."""
    model = make_model(family)
    model.save_pretrained(folder)
    return model


def changed(folder: Path, part: str, **fields: Any) -> None:
    """Change fields of a part of the config, or beside the parts; None removes one."""
    file = folder / "config.json"
    config = json.loads(file.read_text())
    where = config[part] if part else config
    where |= fields
    for name in [name for name, value in where.items() if value is None]:
        del where[name]
    file.write_text(json.dumps(config))


def test_an_image_matters(tower: str) -> None:
    """So that equal answers to it prove something."""
    model = make_model(tower)
    given = make_image(model)
    other = {**given, "pixel_values": given["pixel_values"] + 1}
    with torch.no_grad():
        assert not torch.allclose(model(**other).logits, answers(model), atol=1e-2)


@pytest.mark.parametrize("layer", range(4))
def test_only_layers_above_the_added_features_can_be_skipped(layer: int) -> None:
    """Without a lower one, features of images would be added in other places."""
    model = make_model("qwen3_vl")
    fixed = DecoderView.of(model).fixed_layers
    assert fixed == 2
    skipping = (
        DecoderView.of(model)
        .layers[layer]
        .register_forward_hook(lambda module, given, output: given[0])
    )
    expected = answers(model)
    skipping.remove()
    if layer < fixed:
        with pytest.raises(PlanError, match=f"layer {layer}; the lowest 2 layers"):
            apply_layers(model, [DropLayers(indices=(layer,))])
        view = DecoderView.of(model)
        view.put_layers(torch.nn.ModuleList(x for i, x in enumerate(view.layers) if i != layer))
        assert not torch.allclose(answers(model), expected, atol=1e-3)
        return
    apply_layers(model, [DropLayers(indices=(layer,))])
    assert torch.allclose(answers(model), expected, atol=1e-6)


def test_no_operation_touches_a_layer_that_must_stay() -> None:
    """Neither on a model nor in a plan that is read; the first layer above may go."""
    model = make_model("qwen3_vl")
    for operation in (
        MergeLayers(first=1, last=2, rule="mean"),
        DropSublayers(attention=(2,), mlp=(1,)),
    ):
        with pytest.raises(PlanError, match="features of images"):
            apply_layers(model, [operation])
    cls = pruners.get("deepest")
    session = Session(model)
    made = session.plan(cls(cls.Options(), Target(layers_removed=3)))
    assert [op.indices for op in made.operations] == [(4,), (3,), (2,)]
    data = json.loads(made.to_json())
    data["operations"][0]["indices"] = [1]
    with pytest.raises(PlanError, match="features of images") as caught:
        PruningPlan.parse(json.dumps(data))
    assert "\n" not in caught.value.message


@pytest.mark.parametrize("name", ["deepest", "block_influence", "slm", "laco", "streamline"])
def test_a_target_that_needs_those_layers_is_refused(name: str) -> None:
    """Before any work, with their number."""
    model = make_model("qwen3_vl")
    session = Session(model, calibration=random_tokens())
    cls = pruners.get(name)
    options = {"layers_per_merge": 2} if name == "laco" else {}
    with pytest.raises(TargetError, match=r"lowest 2|protect_first 2"):
        session.plan(cls(cls.Options(**options), Target(layers_removed=5)))
    assert kinds_of(session.view)[:2] == (0, 1)


@pytest.mark.parametrize("level", ["", "vision_model."])
def test_names_of_every_release_are_read(tower: str, level: str, tmp_path: Path) -> None:
    """Those of the first one and those in memory, with the vision model at either depth."""
    model = saved(tmp_path, tower)
    file = tmp_path / "model.safetensors"
    names = {
        name: re.sub(r"vision_tower\.(vision_model\.)?", f"vision_tower.{level}", name)
        for name in load_file(file)
    }
    if level:
        names = {
            name: new.replace("language_model.model.", "model.language_model.").replace(
                "language_model.lm_head.", "lm_head."
            )
            for name, new in names.items()
        }
    tensors = load_file(file)
    save_file({names[name]: tensor for name, tensor in tensors.items()}, file)
    read: Any = load(ModelSource(id=str(tmp_path)))[0]
    assert torch.equal(answers(read), answers(model))
    if tower == "qwen3_vl":
        # With heads as short as here, other sections compute the same.
        assert read.model.language_model.rotary_emb.mrope_section == [2, 1, 1]


@pytest.mark.parametrize("tied", [False, True])
def test_both_releases_read_what_is_written(
    tower: str, tied: bool, tmp_path: Path, reload_here: None
) -> None:
    """Their names of weights and settings, and tied embeddings stated where either looks."""
    session = Session(make_model(tower, tie_word_embeddings=tied, num_hidden_layers=3))
    session.export(CheckpointExporter(CheckpointExporter.Options()), tmp_path)
    folder = tmp_path / "checkpoint"
    names = set(load_file(folder / "model.safetensors"))
    config = json.loads((folder / "config.json").read_text())
    text = config["text_config"]
    assert config["tie_word_embeddings"] is text["tie_word_embeddings"] is tied
    assert text["rope_theta"] == (10_000.0 if tower == "llava" else 1_000_000.0)
    if tower == "qwen3_vl":
        assert text["rope_scaling"]["mrope_section"] == [2, 1, 1]
        assert "model.language_model.layers.0.mlp.up_proj.weight" in names
    else:
        assert "language_model.model.layers.0.mlp.up_proj.weight" in names
        assert any(name.startswith("vision_tower.vision_model.encoder.") for name in names)
        assert not any(name.startswith("vision_tower.encoder.") for name in names)


@pytest.mark.parametrize("config", [GEMMA_4B, LLAVA_7B], ids=["gemma", "llava"])
def test_configs_with_only_what_differs_are_read(config: dict[str, Any], tmp_path: Path) -> None:
    """As they are published."""
    file = tmp_path / "config.json"
    file.write_text(json.dumps(config))
    found: Any = read_configuration(file).config
    text = found.text_config
    if config is LLAVA_7B:
        assert (text.hidden_size, text.num_hidden_layers, text.head_dim) == (4096, 32, 128)
        assert str(found.dtype) == "torch.float16" and not text.tie_word_embeddings
    else:
        assert (text.vocab_size, text.num_attention_heads, text.head_dim) == (262_208, 8, 256)
        assert text.layer_types[:6] == ["sliding_attention"] * 5 + ["full_attention"]
        assert text.tie_word_embeddings is found.tie_word_embeddings is True
        four = transformers.__version__.startswith("4.")
        rope = text.rope_scaling if four else text.rope_parameters["full_attention"]
        assert rope["factor"] == 8.0


@pytest.mark.parametrize(
    ("family", "part", "fields", "words"),
    [
        ("llava", "", {"text_config": None}, "text_config of .* must be an object"),
        ("llava", "", {"vision_config": 3}, "vision_config of .* must be an object"),
        ("llava", "text_config", {"model_type": "mistral"}, "text_config.model_type .* mistral"),
        ("llava", "text_config", {"head_dim": 7}, "text_config.head_dim"),
        ("llava", "vision_config", {"model_type": "pixtral"}, "pixtral, which is not supported"),
        ("llava", "vision_config", {"hidden_size": 0}, "vision_config.hidden_size"),
        ("llava", "vision_config", {"num_hidden_layers": 3}, "2 layers of its vision model"),
        ("llava", "", {"vision_feature_layer": "last"}, "vision_feature_layer"),
        ("llava", "text_config", {"num_hidden_layers": 5}, "6 layers"),
        ("gemma3_tower", "text_config", {"layer_types": ["full_attention"]}, "1 layer_types"),
        ("gemma3_tower", "text_config", {"final_logit_softcapping": 30.0}, "softcapping"),
        ("gemma3_tower", "", {"image_token_index": -1}, "image_token_index"),
        (
            "gemma3_tower",
            "text_config",
            {"quantization_config": {"quant_method": "awq"}},
            "text_config of .* describes quantised weights .*awq",
        ),
        ("gemma3_tower", "", {"quantization_config": {"quant_method": "awq"}}, "awq"),
        ("gemma3_tower", "vision_config", {"to_dict": 1}, "no setting of a model"),
        ("qwen3_vl", "vision_config", {"out_hidden_size": 16}, "out_hidden_size 16"),
        ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": None}, "deepstack_visual"),
        ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": [0] * 7}, "7 entries"),
        (
            "qwen3_vl",
            "text_config",
            {"rope_scaling": {"rope_type": "default", "mrope_section": [2, 2]}},
            "mrope_section",
        ),
        (
            "qwen3_vl",
            "text_config",
            {"rope_theta": None, "rope_parameters": None, "rope_scaling": SECTIONS},
            "rope_theta",
        ),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, family: str, part: str, fields: dict[str, Any], words: str
) -> None:
    """That names the part and the field."""
    saved(tmp_path, family)
    changed(tmp_path, part, **fields)
    with pytest.raises(SlmError, match=words) as caught:
        load(ModelSource(id=str(tmp_path), device="cpu"))
    assert "\n" not in str(caught.value)


def test_parts_that_disagree_about_the_head_are_refused(tower: str, tmp_path: Path) -> None:
    """Each release would believe another one."""
    saved(tmp_path, tower)
    changed(tmp_path, "", tie_word_embeddings=False)
    changed(tmp_path, "text_config", tie_word_embeddings=True)
    with pytest.raises(ModelSourceError, match="contradicts itself: tie_word_embeddings"):
        load(ModelSource(id=str(tmp_path)))


def test_a_streamed_model_is_written_as_one_in_memory(
    tower: str, tmp_path: Path, reload_here: None
) -> None:
    """The same tensors by the same names."""
    saved(tmp_path / "source", tower)
    for memory in ("whole", "layerwise"):
        model, _ = load(ModelSource(id=str(tmp_path / "source"), memory=memory))
        apply_layers(model, [DropLayers(indices=(3,))])
        options = CheckpointExporter.Options()
        Session(model).export(CheckpointExporter(options), tmp_path / memory)
    whole, layerwise = (
        load_file(tmp_path / memory / "checkpoint" / "model.safetensors")
        for memory in ("whole", "layerwise")
    )
    assert whole.keys() == layerwise.keys()
    assert all(torch.equal(whole[name], layerwise[name]) for name in whole)


def test_code_in_any_part_is_left_out(tower: str, tmp_path: Path) -> None:
    """Never run, and the model is the same."""
    model = saved(tmp_path, tower)
    for part in ("", "text_config", "vision_config"):
        changed(tmp_path, part, auto_map={"AutoModel": "evil.Model"}, trust_remote_code=True)
    read, _ = load(ModelSource(id=str(tmp_path)))
    assert "auto_map" not in read.config.to_json_string()
    assert torch.equal(answers(read), answers(model))


def test_one_number_format_holds_for_all_parts(tower: str, tmp_path: Path) -> None:
    """Whatever the parts say."""
    saved(tmp_path, tower)
    for part in ("text_config", "vision_config"):
        changed(tmp_path, part, dtype="bfloat16", torch_dtype="bfloat16")
    read, _ = load(ModelSource(id=str(tmp_path), dtype="float32"))
    assert {weight.dtype for weight in read.parameters()} == {torch.float32}


def test_files_of_the_processor_are_carried_over(tmp_path: Path, reload_here: None) -> None:
    """Without what names code; a damaged one is told when the model is read."""
    source = tmp_path / "source"
    saved(source, "llava")
    files = {
        "preprocessor_config.json": {"image_mean": [0.5], "auto_map": {"A": "evil.B"}},
        "processor_config.json": {"patch_size": 4},
        "video_preprocessor_config.json": {"fps": 2},
        "chat_template.json": {"chat_template": "{{ messages }}"},
    }
    for name, content in files.items():
        (source / name).write_text(json.dumps(content))
    (source / "chat_template.jinja").write_text("{{ messages }}")
    model, _ = load(ModelSource(id=str(source)))
    Session(model).export(CheckpointExporter(CheckpointExporter.Options()), tmp_path)
    for name, content in files.items():
        written = json.loads((tmp_path / "checkpoint" / name).read_text())
        assert written == {key: value for key, value in content.items() if key != "auto_map"}
    assert (tmp_path / "checkpoint" / "chat_template.jinja").read_text() == "{{ messages }}"
    (source / "processor_config.json").write_text("{")
    with pytest.raises(ModelSourceError, match=r"processor_config\.json"):
        load(ModelSource(id=str(source)))


def test_onnx_is_refused_when_the_recipe_is_read(tower: str, tmp_path: Path) -> None:
    """With the reason."""
    saved(tmp_path, tower)
    data = {
        "model": {"id": str(tmp_path)},
        "stages": [{"prune": "deepest", "target": {"layers_removed": 1}}],
        "export": [{"onnx": {}}],
    }
    model = make_model(tower)
    reason = complaint(exporters.get("onnx"), DecoderView.of(model).family, {})
    assert "without the images" in reason
    pytest.importorskip("optimum.onnxruntime")
    with pytest.raises(SlmError, match="without the images"):
        Recipe.from_dict(data)


def test_a_recipe_that_leaves_no_layer_is_refused_when_it_is_read(
    tower: str, tmp_path: Path
) -> None:
    """The layers are those of the text."""
    saved(tmp_path, tower)
    stage = {"prune": "deepest", "target": {"layers_removed": 6}}
    with pytest.raises(SlmError, match="6 layers"):
        Recipe.from_dict({"model": {"id": str(tmp_path)}, "stages": [stage]})


def test_adapters_are_put_into_the_text_alone(tower: str) -> None:
    """Vision models have projections by the same names."""
    peft = pytest.importorskip("peft")
    model = make_model(tower)
    found = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=_targets(DecoderView.of(model).family))
    )
    adapted = {name for name, weight in found.named_parameters() if weight.requires_grad}
    assert len(adapted) == 2 * 7 * len(DecoderView.of(model).layers)
    assert all(".model.language_model.layers." in name for name in adapted)


def test_the_hash_of_the_weights_knows_no_release() -> None:
    """A plan of one release applies in the other."""
    for name in ("model.vision_tower.encoder.a", "model.vision_tower.vision_model.encoder.a"):
        assert common_name(name) == "model.vision_tower.encoder.a"
    assert common_name("model.visual.blocks.0.a") == "model.visual.blocks.0.a"


def test_inspection_counts_the_vision_model(tower: str, tmp_path: Path) -> None:
    """Ratios are shares of all parameters, those of the vision model among them."""
    model = saved(tmp_path, tower)
    found = inspection(DecoderView.of(model))
    total = sum(p.numel() for p in model.parameters())
    outside = sum(p.numel() for n, p in model.named_parameters() if "vi" in n or "multi_modal" in n)
    assert found["dimensions"]["parameters"] == sum(found["parameters"].values()) == total
    assert found["parameters"]["vision"] == outside > 0
    shown = command("inspect", str(tmp_path)).stdout
    assert "vision" in shown
    assert ("must stay" in shown) == (tower == "qwen3_vl")


def test_images_do_not_calibrate(tower: str) -> None:
    """Neither pixels nor the tokens in whose place they are put are left out in silence."""
    model = make_model(tower)
    ids = random_tokens(4, 12)
    for name in ("pixel_values", "image_grid_thw"):
        with pytest.raises(CalibrationError, match=f"holds `{name}`, and text alone calibrates"):
            prune(model, None, "deepest", layers_removed=1, calibration={"input_ids": ids, name: 0})
    ids[1, 3] = next(
        value
        for name in ("image_token_id", "image_token_index")
        if (value := getattr(model.config, name, None)) is not None
    )
    with pytest.raises(CalibrationError, match="stands for an image"):
        prune(model, None, "deepest", layers_removed=1, calibration=ids)
