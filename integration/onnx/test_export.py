"""The onnx exporter against Optimum and ONNX Runtime as they are installed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from integration.onnx.conftest import pruned_session
from slm_plugin.errors import OutputError, SlmError, UnsupportedModelError, VerificationError
from slm_plugin.export import onnx as onnx_exporter
from slm_plugin.export.checkpoint import save_checkpoint
from slm_plugin.export.onnx import OnnxExporter, OnnxOptions, verify_onnx
from slm_plugin.export.ort_heads import load_ort_model
from slm_plugin.export.parity import NEW_TOKENS, reference
from slm_plugin.models.operators import operators, put_operator
from slm_plugin.plans import KeepChannels
from slm_plugin.pruners.width.width import Width
from slm_plugin.pruners.width.width_options import WidthOptions
from slm_plugin.session import Session
from slm_plugin.surgery.channels import apply_channels
from slm_plugin.target import Target
from tests.tiny import FAMILIES, make_model, random_tokens

# What Optimum 0.1 for ONNX lacks: OLMo 3, two mixtures of experts, and ALiBi.
LACKED = ("olmo3", "mixtral", "qwen2_moe")
# Models of images and text are refused: the graph would be that of the text alone.
HELD = sorted(
    name
    for name, (family, _) in FAMILIES.items()
    if family.tower is None and name not in (*LACKED, "falcon_sequential")
)
pytest.importorskip("optimum.onnxruntime", exc_type=ImportError)


@pytest.mark.parametrize(("family", "tied"), [("llama", True), *((name, False) for name in HELD)])
def test_every_family_computes_the_same_in_onnx_runtime(
    tmp_path: Path, family: str, tied: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    """Fewer layers, an uneven head size: logits and cached greedy tokens are the model's."""
    # Falcon's new architecture is refused: Optimum has no groups of key/value heads for it.
    own = {"new_decoder_architecture": False} if family == "falcon" else {}
    session = pruned_session(family, tie_word_embeddings=tied, **own)
    record = OnnxExporter(OnnxOptions()).export(session, tmp_path)
    logits, generation, one_pass = (check.value for check in record.checks)
    assert 0 < logits < 1e-4
    assert generation == one_pass == 0
    assert record.folder == "onnx"
    assert record.size_bytes > session.original.parameters * 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["onnx"]
    assert capfd.readouterr().out == ""


@pytest.mark.parametrize("family", LACKED)
def test_a_family_that_optimum_lacks_is_refused_before_any_work(family: str) -> None:
    """With its name, as long as the installed release has none."""
    with pytest.raises(UnsupportedModelError, match=f"exports no {family} to ONNX"):
        OnnxExporter(OnnxOptions()).check_model(pruned_session(family))


@pytest.mark.parametrize("place", ["model.embed_tokens", "model.layers.1", "model.layers.2"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "granite"])
def test_operators_between_layers_are_in_the_graph(tmp_path: Path, family: str, place: str) -> None:
    """Behind the embedding, a layer or the last one; without them the logits would be others."""
    session = pruned_session(family, tie_word_embeddings=True)
    plain = reference(session).logits[0]
    generator = torch.Generator().manual_seed(0)
    matrix = torch.eye(48) + 0.3 * torch.randn(48, 48, generator=generator)
    put_operator(session.model.get_submodule(place), matrix)
    record = OnnxExporter(OnnxOptions()).export(session, tmp_path)
    logits, generation, one_pass = (check.value for check in record.checks)
    assert logits < 1e-4
    assert generation == one_pass == 0
    steps = slice(0, len(plain[0]) - NEW_TOKENS)
    assert float((reference(session).logits[0] - plain)[:, steps].abs().max()) > 0.1
    assert list(operators(session.model)) == [place]
    assert [entry.name for entry in tmp_path.iterdir()] == ["onnx"]


def test_a_graph_holds_a_rotation_for_every_block(tmp_path: Path) -> None:
    """As the plan of the strategy makes it, with the narrower stream and its operators."""
    session = Session(make_model("llama", tie_word_embeddings=True), calibration=random_tokens())
    hidden = {"hidden_channels": 8, "hidden_score": "pca_per_block", "restore": "none"}
    options = WidthOptions.model_validate({"multiple_of": 4, **hidden})
    plan = session.plan(Width(options, Target(ratio=0.3)))
    session.apply(plan)
    assert len(operators(session.model)) == 2 * plan.after.layers
    record = OnnxExporter(OnnxOptions()).export(session, tmp_path)
    logits, generation, one_pass = (check.value for check in record.checks)
    assert 0 < logits < 1e-4
    assert generation == one_pass == 0


def test_a_graph_holds_layers_of_their_own_width(tmp_path: Path) -> None:
    """The checkpoint that it is traced from is padded; the graph is not."""
    session = pruned_session("llama")
    even = OnnxExporter(OnnxOptions()).export(session, tmp_path / "even")
    size = session.view.dimensions().intermediate_size
    widths = (size - 32, size, size - 16)
    keep = [KeepChannels(layer=i, indices=tuple(range(n))) for i, n in enumerate(widths)]
    apply_channels(session.model, keep)
    record = OnnxExporter(OnnxOptions()).export(Session(session.model), tmp_path)
    logits, generation, one_pass = (check.value for check in record.checks)
    assert 0 < logits < 1e-4
    assert generation == one_pass == record.padding == 0
    removed = 48 * session.view.dimensions().channel_parameters * 4
    assert even.size_bytes - record.size_bytes >= removed


def test_the_folder_is_whole(exported: tuple[Session, Path]) -> None:
    """Graph, config, generation config and tokenizer lie together, head_dim written out."""
    _, folder = exported
    names = {file.name for file in folder.iterdir()}
    assert {"model.onnx", "config.json", "generation_config.json", "tokenizer.json"} <= names
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert (config["num_attention_heads"], config["head_dim"]) == (4, 8)
    assert config["num_hidden_layers"] == 3


@torch.no_grad()
def test_padded_batches_generate_the_same(exported: tuple[Session, Path]) -> None:
    """Rows of different lengths, padded on the left, go on as they do in PyTorch."""
    session, folder = exported
    ids = torch.tensor([[2, 2, 2, 40, 41, 42], [7, 8, 9, 10, 11, 12]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    settings = {"attention_mask": mask, "max_new_tokens": 8, "min_new_tokens": 8}
    expected = session.model.generate(ids, **settings)
    assert torch.equal(load_ort_model(folder).generate(ids, **settings), expected)


def test_without_cache(tmp_path: Path) -> None:
    """The task text-generation has no cache inputs; it generates all the same."""
    session = pruned_session()
    record = OnnxExporter(OnnxOptions(task="text-generation")).export(session, tmp_path)
    assert [check.value for check in record.checks[1:]] == [0, 0]
    assert not load_ort_model(tmp_path / "onnx").can_use_cache


def test_a_narrow_model_becomes_a_float32_graph(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its weights, widened, are what is compared, within the tolerance of float32; it is said."""
    session = pruned_session()
    for parameter in session.model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)
    record = OnnxExporter(OnnxOptions()).export(session, tmp_path)
    assert record.checks[0].value < 1e-4
    assert session.model.dtype == torch.bfloat16
    assert "its ONNX graph is float32" in capsys.readouterr().err
    config = json.loads((tmp_path / "onnx" / "config.json").read_text(encoding="utf-8"))
    assert config["dtype"] == "float32"


def test_the_checkpoint_of_the_run_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint that lies there is not written a second time."""
    session = pruned_session()
    (tmp_path / "checkpoint").mkdir()
    save_checkpoint(session, tmp_path / "checkpoint")
    monkeypatch.delattr(onnx_exporter, "save_checkpoint")
    assert OnnxExporter(OnnxOptions()).export(session, tmp_path)


def test_a_tampered_weight_fails_with_a_figure(
    exported: tuple[Session, Path], tmp_path: Path
) -> None:
    """A final norm that is a tenth larger moves the largest logit by a tenth of itself."""
    import onnx
    from onnx import numpy_helper

    session, folder = exported
    shutil.copytree(folder, tmp_path / "onnx")
    file = str(tmp_path / "onnx" / "model.onnx")
    graph = onnx.load(file)
    weight = next(t for t in graph.graph.initializer if t.name == "model.norm.weight")
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 1.1, weight.name))
    onnx.save(graph, file)
    with pytest.raises(VerificationError, match=r"largest logit difference") as caught:
        verify_onnx(session, tmp_path / "onnx")
    figure = float(str(caught.value).split("difference ")[1].split(",")[0])
    assert figure == pytest.approx(reference(session).scale / 10, rel=1e-2)


def test_the_opset_is_the_one_asked_for(tmp_path: Path) -> None:
    """The graph declares it."""
    import onnx

    OnnxExporter(OnnxOptions(opset=17)).export(pruned_session(), tmp_path)
    graph = onnx.load(str(tmp_path / "onnx" / "model.onnx"))
    assert [entry.version for entry in graph.opset_import if entry.domain == ""] == [17]


def test_what_optimum_refuses_is_one_line(tmp_path: Path) -> None:
    """An operator set beyond those that a recipe may ask for; no file is left."""
    options = OnnxOptions().model_copy(update={"opset": 99})
    with pytest.raises(SlmError, match="Optimum cannot export the model to ONNX: ") as caught:
        OnnxExporter(options).export(pruned_session(), tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_refused(exported: tuple[Session, Path]) -> None:
    """Nothing is overwritten."""
    session, folder = exported
    with pytest.raises(OutputError, match="exists"):
        OnnxExporter(OnnxOptions()).export(session, folder.parent)
