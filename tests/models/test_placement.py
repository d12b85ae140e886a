"""Models spread over several places: the same bits as in one place."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slm_plugin.errors import MissingExtraError, ModelSourceError
from slm_plugin.models import loading, placement
from slm_plugin.models.checkpoint import read_checkpoint
from slm_plugin.models.layerwise import build
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.models.placement import Resident, outgrows, place_layers, places
from slm_plugin.models.stored import total_bytes
from slm_plugin.models.streaming import is_streamed
from slm_plugin.models.torch_subclasses import StreamedParameter
from slm_plugin.pruners.depth.slm import SlidingLayerMerging, SlmOptions
from slm_plugin.recipe import Recipe
from slm_plugin.session import Session, apply
from slm_plugin.target import Target
from tests.tiny import make_model, random_tokens

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A tiny checkpoint of eight layers."""
    make_model(num_hidden_layers=8).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def planned(model: torch.nn.Module) -> tuple[str, object]:
    """A plan and the fingerprint behind it, with a rule that computes across places."""
    session = Session(model, calibration=random_tokens())  # type: ignore[arg-type]
    options = SlmOptions(merge_rule="mean")
    plan = SlidingLayerMerging(options, Target(layers_removed=4)).plan(session)
    apply(plan, session)
    return plan.to_json(), session.fingerprint()


def streamed(folder: Path) -> torch.nn.Module:
    """The checkpoint, all layers on disk."""
    return build(read_checkpoint(folder), "auto", CPU, streamed=True)


def test_accelerate_fills_memory_and_leaves_the_rest_on_disk(folder: Path) -> None:
    """With room for some layers, those are in memory for good; the plan is the same."""
    pytest.importorskip("accelerate")
    model = streamed(folder)
    place_layers(model, places(model, {"cpu": 150_000}))
    on_disk = [is_streamed(layer) for layer in model.model.layers]
    assert on_disk[0] is False and on_disk[-1] is True
    whole = load(ModelSource(id=str(folder), device="cpu"))[0]
    assert planned(model) == planned(whole)


def test_layers_elsewhere_run_at_home(folder: Path) -> None:
    """A layer on another device is streamed from there; the file is not needed any more."""
    model = streamed(folder)
    where = {"model.layers.1": "cpu", "model.layers.5": "cpu:0", "model.layers": "cpu:0"}
    place_layers(model, where)
    assert not is_streamed(model.model.layers[1])
    for index in (0, 5):
        for parameter in model.model.layers[index].parameters():
            assert isinstance(parameter, StreamedParameter) and isinstance(
                parameter.source, Resident
            )
    whole = load(ModelSource(id=str(folder), device="cpu"))[0]
    for file in folder.glob("*.safetensors"):
        file.unlink()
    model.lm_head = whole.lm_head
    assert planned(model) == planned(whole)


def test_a_model_outgrows_a_gpu_by_its_weights(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fifth of the free memory is for activations; a CPU is never outgrown."""
    size = total_bytes(read_checkpoint(folder).stored.values())
    for free, expected in ((size, True), (int(size / 0.79), False)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
        assert outgrows(torch.device("cuda"), read_checkpoint(folder)) == expected
    assert not outgrows(CPU, read_checkpoint(folder))


def test_auto_spreads_what_is_too_large_and_refuses_what_cannot_follow(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Loading takes the way over `places`; a width stage then stops before any work."""
    import slm_plugin

    class Gpu:
        """A CPU that passes for a GPU where loading asks."""

        type = "cuda"

    monkeypatch.setattr(loading, "pick_device", lambda _: Gpu)
    monkeypatch.setattr(loading, "outgrows", lambda *_: True)
    monkeypatch.setattr(loading, "build", lambda a, b, _, streamed: build(a, b, CPU, streamed=True))
    monkeypatch.setattr(loading, "places", lambda _: {"model.layers.0": "cpu"})
    model, _ = load(ModelSource(id=str(folder)))
    assert [is_streamed(layer) for layer in model.model.layers] == [False, *[True] * 7]
    pytest.importorskip("torch_pruning")
    recipe = Recipe.parse(
        f"version: 1\nmodel: {{id: {folder}}}\ncalibration: {{source: builtin}}\n"
        f"stages: [{{prune: torch_pruning, target: {{ratio: 0.1}}}}]\noutput: {tmp_path / 'out'}\n"
    )
    with pytest.raises(ModelSourceError, match="larger than the GPU, and 'torch_pruning' needs"):
        slm_plugin.run(recipe)


def test_a_missing_accelerate_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message says which extra brings it."""
    model = streamed(folder)
    monkeypatch.setattr("slm_plugin.extras.found_version", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"slm-plugin\[big\]"):
        placement.places(model)  # type: ignore[arg-type]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_model_larger_than_the_gpu_is_spread(tmp_path: Path) -> None:
    """With most of the GPU's memory taken: the plan of the model that lies on it whole."""
    pytest.importorskip("accelerate")
    wide = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 12}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4, "head_dim": 64}
    model = make_model(**wide, **heads)
    model.save_pretrained(tmp_path)
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    source = ModelSource(id=str(tmp_path), device="auto")
    whole = load(source)[0]
    assert {p.device.type for p in whole.parameters()} == {"cuda"}
    expected = planned(whole)
    del whole
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    taken = torch.empty(int(free - 0.6 * size - 2e8), dtype=torch.uint8, device="cuda")
    spread = load(source)[0]
    assert is_streamed(spread)
    assert planned(spread) == expected
    del taken
