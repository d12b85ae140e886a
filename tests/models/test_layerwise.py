"""Streamed models against the same models in memory: equal bits, little memory."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from slm_plugin.errors import ModelSourceError
from slm_plugin.models import stored
from slm_plugin.models.families.llama import LLAMA
from slm_plugin.models.fingerprint import fingerprint
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.models.streaming import held, is_streamed
from slm_plugin.models.torch_subclasses import StreamedParameter
from slm_plugin.plans import DropLayers, MergeLayers
from slm_plugin.pruners.depth.search.runs import Run
from slm_plugin.pruners.depth.search.trials import Trials
from slm_plugin.pruners.depth.slm import SlidingLayerMerging, SlmOptions
from slm_plugin.registry import pruners
from slm_plugin.session import Session, apply
from slm_plugin.surgery.layers import apply_layers
from slm_plugin.surgery.merge_rules import merged_layer
from slm_plugin.target import Target
from tests.tiny import make_model, random_tokens

RULES = ("telescoped", "rdsc", "mean", "keep_low", "keep_high", "ema(0.3)", "weighted(1,2,3)")


def both(folder: Path, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedModel]:
    """A checkpoint in memory, and layer by layer."""
    whole, layerwise = (
        load(ModelSource(id=str(folder), dtype=dtype, device="cpu", memory=memory))[0]  # type: ignore[arg-type]
        for memory in ("whole", "layerwise")
    )
    return whole, layerwise


def saved(folder: Path, family: str = "llama", **settings: object) -> Path:
    """A tiny checkpoint in several files."""
    make_model(family, **settings).save_pretrained(folder, max_shard_size="30KB")
    return folder


def resident(model: nn.Module) -> set[str]:
    """Names of parameters that are in memory."""
    return {name for name, p in model.named_parameters() if p.device.type != "meta"}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_plans_are_equal_byte_for_byte(tmp_path: Path, family: str, tied: bool, dtype: str) -> None:
    """Operations, trials, similarities and fingerprint; several batches; then the model itself."""
    folder = saved(tmp_path, family, num_hidden_layers=6, tie_word_embeddings=tied)
    found = []
    for model in both(folder, dtype):
        session = Session(model, calibration=random_tokens(5, 16), batch_tokens=40)
        plan = SlidingLayerMerging(SlmOptions(), Target(layers_removed=2)).plan(session)
        apply(plan, session)
        found.append((plan.to_json(), session.fingerprint(), model.config.to_dict()))
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("target", "options"),
    [
        (Target(threshold=0.5), {}),
        (Target(layers_removed=2), {"criterion": "loss", "search": "greedy"}),
        (Target(layers_removed=2), {"criterion": "logit_kl", "merge_rule": "best"}),
        (Target(layers_removed=2), {"criterion": "cka", "search": "budgeted"}),
    ],
)
def test_every_criterion_and_search_streams(
    tmp_path: Path, target: Target, options: dict[str, object]
) -> None:
    """Where the head, the layers' influence or decided trials come in, plans are equal too."""
    folder = saved(tmp_path, num_hidden_layers=6)
    found = []
    for model in both(folder):
        session = Session(model, calibration=random_tokens(5, 16), batch_tokens=40)
        found.append(SlidingLayerMerging(SlmOptions(**options), target).plan(session))  # type: ignore[arg-type]
    assert found[0].to_json() == found[1].to_json()
    assert found[0].operations


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("block_influence", {}),
        ("angular", {}),
        ("deepest", {}),
        ("sleb", {}),
        ("laco", {}),
        ("layer_sparsity", {}),
        ("layer_sparsity", {"by": "owl"}),
        ("merge_concat", {}),
        ("sublayer", {}),
        ("streamline", {}),
        ("shapley", {"samples": 10}),
    ],
)
def test_strategies_that_run_layers_stream(
    tmp_path: Path, name: str, options: dict[str, object]
) -> None:
    """Same plan, scores and trials to the last digit, and the same model behind it."""
    folder = saved(tmp_path, num_hidden_layers=6)
    kind = pruners.get(name)
    found = []
    for model in both(folder):
        session = Session(model, calibration=random_tokens(5, 16), batch_tokens=40)
        plan = kind(kind.Options(**options), Target(layers_removed=2)).plan(session)
        apply(plan, session)
        found.append((plan.to_json(), session.fingerprint()))
    assert found[0] == found[1]


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_merges_to_the_same_bits(tmp_path: Path, family: str, rule: str) -> None:
    """Logits, greedy tokens and fingerprint behind merges, a merge of merges and a drop."""
    models = both(saved(tmp_path, family, num_hidden_layers=8), "bfloat16")
    tokens = random_tokens(2, 11)
    found = []
    for model in models:
        apply_layers(model, [MergeLayers(first=1, last=3, rule=rule)])
        apply_layers(model, [MergeLayers(first=0, last=2, rule=rule), DropLayers(indices=(4,))])
        with torch.inference_mode():
            logits = model(tokens).logits
        greedy = model.generate(tokens, max_new_tokens=4, do_sample=False)
        found.append((logits, greedy, fingerprint(model)))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][2] == found[1][2]


def test_only_embedding_and_norm_stay_in_memory(tmp_path: Path) -> None:
    """Before and after a forward, a plan and surgery, layers and head hold nothing."""
    for tied in (True, False):
        folder = saved(tmp_path / str(tied), num_hidden_layers=8, tie_word_embeddings=tied)
        model = both(folder)[1]
        expected = {"model.embed_tokens.weight", "model.norm.weight"}
        assert resident(model) == expected
        session = Session(model, calibration=random_tokens())
        plan = SlidingLayerMerging(SlmOptions(), Target(layers_removed=3)).plan(session)
        apply(plan, session)
        model(random_tokens())
        assert resident(model) == expected
        assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_one_layer_at_a_time(tmp_path: Path) -> None:
    """While any layer runs, no other layer and no head is in memory."""
    model = both(saved(tmp_path))[1]
    seen = []

    def look(_module: nn.Module, _args: object, _output: object) -> None:
        seen.append(sum(not is_streamed(layer) for layer in model.model.layers))

    for layer in model.model.layers:
        layer.mlp.register_forward_hook(look)
    model(random_tokens())
    assert seen == [1] * 6


def test_each_trial_reads_its_suffix_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many batches there are, a trial reads the merged layer and the layers above it."""
    model = both(saved(tmp_path))[1]
    session = Session(model, calibration=random_tokens(6, 16), batch_tokens=16)
    reads = []
    monkeypatch.setattr(stored.StoredTensor, "read", _noting(reads, stored.StoredTensor.read))
    session.captured()
    assert len(reads) == 6 * 9
    trials = Trials(session, "flat_cosine", "telescoped")
    reads.clear()
    trials(2, 4, ())
    assert len(reads) == 2 * 9
    reads.clear()
    trials(0, 1, (Run(3, 4, "telescoped"),))
    assert len(reads) == 4 * 9


def _noting(reads: list[object], read: object) -> object:
    def noted(self: stored.StoredTensor) -> torch.Tensor:
        reads.append(self)
        return read(self)  # type: ignore[operator,no-any-return]

    return noted


def test_a_failing_forward_gives_the_weights_back(tmp_path: Path) -> None:
    """An interrupted layer is streamed again, held or not."""
    model = both(saved(tmp_path))[1]
    layer = model.model.layers[0]
    with pytest.raises((TypeError, AttributeError)):
        layer("no tensor")
    assert all(isinstance(p, StreamedParameter) for p in layer.parameters())
    with pytest.raises((TypeError, AttributeError)), held(layer):
        assert not is_streamed(layer)
        layer("no tensor")
    assert all(isinstance(p, StreamedParameter) for p in layer.parameters())


def test_a_held_layer_stays_for_several_forwards(tmp_path: Path) -> None:
    """The holder gives the weights back, not the forward inside."""
    whole, model = both(saved(tmp_path))
    hidden = torch.randn(1, 3, 32)
    places = whole.model.rotary_emb(hidden, torch.arange(3)[None])
    layer = model.model.layers[2]
    expected = whole.model.layers[2](hidden, position_embeddings=places)
    with held(layer):
        for _ in range(2):
            found = layer(hidden, position_embeddings=places)
            assert not is_streamed(layer)
    assert is_streamed(layer)
    assert torch.equal(torch.as_tensor(found[0]), torch.as_tensor(expected[0]))


def test_copies_and_merged_layers_hold_no_memory(tmp_path: Path) -> None:
    """A merged layer of any rule is streamed, and so is a deep copy."""
    layers = list(both(saved(tmp_path))[1].model.layers)
    for made in (
        *(merged_layer(rule, layers[1:4], LLAMA) for rule in RULES),
        copy.deepcopy(layers[0]),
    ):
        assert all(isinstance(p, StreamedParameter) for p in made.parameters())


def test_the_number_format_is_that_of_the_whole_model(tmp_path: Path) -> None:
    """Auto takes the config's format, without one the weights'; a wish casts at reading."""
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    for dtype in ("auto", "float32", "float16"):
        whole, layerwise = both(tmp_path, dtype)
        assert fingerprint(whole) == fingerprint(layerwise)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config = {k: v for k, v in config.items() if k not in ("dtype", "torch_dtype")}
    file.write_text(json.dumps(config), encoding="utf-8")
    assert both(tmp_path)[1].dtype == torch.bfloat16


def test_settings_come_along(tmp_path: Path) -> None:
    """Generation settings and a rotary base of its own are the checkpoint's."""
    model = make_model()
    model.generation_config.max_new_tokens = 77
    model.save_pretrained(tmp_path)
    whole, layerwise = both(tmp_path)
    assert layerwise.generation_config.to_dict() == whole.generation_config.to_dict()
    assert layerwise.generation_config.max_new_tokens == 77
    assert torch.equal(layerwise.model.rotary_emb.inv_freq, whole.model.rotary_emb.inv_freq)
    assert not layerwise.training


def _edited(folder: Path, name: str, tensor: torch.Tensor | None) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(name)
    if tensor is not None:
        tensors[name] = tensor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("memory", ["whole", "layerwise"])
@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (None, "lacks 1 weight that its config requires: model.layers.2.mlp.up_proj.weight"),
        (torch.zeros(3, 3), r"model.layers.2.mlp.up_proj.weight is \[3, 3\] instead of \[48, 32\]"),
        (torch.full((48, 32), float("nan")), "holds NaN or infinity in model.layers.2"),
    ],
)
def test_bad_weights_are_refused_at_loading(
    tmp_path: Path, tensor: torch.Tensor | None, words: str, memory: Literal["whole", "layerwise"]
) -> None:
    """Missing, misshapen and non-finite weights: one sentence, before any work."""
    make_model().save_pretrained(tmp_path)
    _edited(tmp_path, "model.layers.2.mlp.up_proj.weight", tensor)
    with pytest.raises(ModelSourceError, match=words):
        load(ModelSource(id=str(tmp_path), memory=memory, device="cpu"))


def test_gguf_is_refused_by_the_source_itself() -> None:
    """A recipe that asks for it is wrong before anything is looked for."""
    with pytest.raises(ValidationError, match="not GGUF"):
        ModelSource(id="model.gguf", memory="layerwise")
