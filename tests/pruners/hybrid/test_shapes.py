"""Shapes that are measured, and models of them with random weights."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch

from slm_plugin.errors import TargetError, UnsupportedModelError
from slm_plugin.evaluation.latency import time_run
from slm_plugin.evaluation.prefill import prefill
from slm_plugin.models.families.encoders import BERT
from slm_plugin.models.view import DecoderView
from slm_plugin.pruners.hybrid.shapes import Shape, shapes_to_measure
from slm_plugin.pruners.hybrid.stand_ins import pruned_config, stand_ins
from slm_plugin.pruners.hybrid.time_model import fit
from tests.tiny import FAMILIES, SMOLLM2, make_model, random_tokens

CPU = torch.device("cpu")


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_stand_ins_have_the_dimensions_asked_for(family: str) -> None:
    """Of every family, and the stock class computes them, without the model being touched."""
    model = make_model(family)
    before, state = copy.deepcopy(model.config.to_dict()), torch.get_rng_state()
    view = DecoderView.of(model)
    dense = view.dimensions()
    # The dense one, and the smallest.
    whole, *others = shapes_to_measure(dense, kv_groups=True)
    shapes = [whole, min(others, key=lambda shape: (shape.kv_groups, shape.mlp_width, shape))]
    made = stand_ins(view, shapes, torch.float32, CPU)
    for shape, found in zip(shapes, made, strict=True):
        assert type(found) is type(model)
        assert DecoderView.of(found).dimensions() == shape.of_model(dense)
        assert found.config._attn_implementation == model.config._attn_implementation
    assert min(time_run(made[1], random_tokens(2, 6), 1)) > 0
    assert model.config.to_dict() == before
    assert torch.equal(torch.get_rng_state(), state)


def test_stand_ins_run_the_operators_of_a_loaded_model(family: str, tmp_path: Path) -> None:
    """Or times of the one would say nothing about the other."""
    make_model(family).save_pretrained(tmp_path)
    model = type(make_model(family)).from_pretrained(tmp_path).eval()
    view = DecoderView.of(model)
    (made,) = stand_ins(view, [Shape.of(view.dimensions())], model.dtype, CPU)
    found = []
    for one in (model, made):
        with torch.inference_mode(), torch.autograd.profiler.profile() as operators:
            prefill(one, random_tokens(1, 6))
        found.append([event.name for event in operators.function_events])
    assert found[0] == found[1]


def test_layers_have_weights_of_their_own() -> None:
    """No two matrices of a model overlap; those of two models lie in the same memory."""
    view = DecoderView.of(make_model(tie_word_embeddings=True, num_hidden_layers=3))
    shapes = shapes_to_measure(view.dimensions(), kv_groups=True)
    made = stand_ins(view, shapes, torch.bfloat16, CPU)
    for model in made:
        spans = sorted(
            (parameter.data_ptr(), parameter.data_ptr() + parameter.nbytes)
            for parameter in model.parameters()
            if parameter.dim() > 1
        )
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert DecoderView.of(model).tied
        assert model.dtype == torch.bfloat16
    storages = {p.untyped_storage().data_ptr() for m in made for p in m.parameters() if p.dim() > 1}
    assert len(storages) == 1


@pytest.mark.parametrize(("family", "pattern"), [("gemma3", 3), ("gemma2", 2), ("olmo3", 4)])
def test_layers_of_both_kinds_are_kept(family: str, pattern: int) -> None:
    """Where one of so many has no window, as many of what is left have none."""
    model = make_model(family, num_hidden_layers=12)
    full = model.config.layer_types.count("full_attention")
    assert full == 12 // pattern
    for layers in range(6, 12):
        kinds = pruned_config(DecoderView.of(model), Shape(layers, 48, 2)).layer_types
        assert len(kinds) == layers
        assert abs(kinds.count("full_attention") - layers / pattern) < 1


def test_the_eight_shapes_of_smollm2() -> None:
    """The dense one first; KV groups and channels as transformers 5 can load them."""
    found = shapes_to_measure(SMOLLM2, kv_groups=True)
    assert found[0] == Shape.of(SMOLLM2) == Shape(30, 1536, 3)
    assert len(found) == len(set(found)) == 8
    assert {shape.layers for shape in found} == {30, 25, 20}
    assert {shape.mlp_width for shape in found} == {1536, 1232, 928}
    assert {shape.kv_groups for shape in found} == {3, 1}
    assert {shape.kv_groups for shape in shapes_to_measure(SMOLLM2)} == {3}


@pytest.mark.parametrize("kv_groups", [False, True])
def test_all_terms_can_be_told_apart(kv_groups: bool) -> None:
    """Without residual, and the term of a KV group where these vary."""
    shapes = shapes_to_measure(SMOLLM2, kv_groups=kv_groups)
    times = {s: 0.5 + s.layers * (1 + 0.2 * s.kv_groups + 0.01 * s.mlp_width) for s in shapes}
    model = fit(times).model
    assert (model.fixed, model.per_channel) == pytest.approx((0.5, 0.01))
    wanted = (1, 0.2) if kv_groups else (1.6, 0)
    assert (model.per_layer, model.per_kv_group) == pytest.approx(wanted)


def test_a_family_without_width_differs_in_layers_alone() -> None:
    """Mixtures of experts and MLPs without a gate: the layers tell outside and inside apart."""
    for family in ("mixtral", "gpt2"):
        shapes = shapes_to_measure(DecoderView.of(make_model(family)).dimensions(), kv_groups=True)
        assert [shape.layers for shape in shapes] == [6, 4, 5]
        assert len({(shape.mlp_width, shape.kv_groups) for shape in shapes}) == 1


@pytest.mark.parametrize(
    ("shape", "words"),
    [
        (Shape(31, 1536, 3), "layers is 31, and can be 1 to 30"),
        (Shape(30, 1544, 3), "mlp_width is 1544, and can be 1 to 1536"),
        (Shape(0, 1536, 3), "layers is 0, and"),
        (Shape(30, 1536, 0), "kv_groups is 0, and can be 1 to 3"),
    ],
)
def test_shapes_that_no_pruning_gives(shape: Shape, words: str) -> None:
    """More than there is, or nothing."""
    with pytest.raises(TargetError, match=words):
        shape.of_model(SMOLLM2)


def test_layers_that_have_to_stay_are_kept() -> None:
    """Qwen3-VL adds features of images to its lowest two."""
    view = DecoderView.of(make_model("qwen3_vl", num_hidden_layers=4))
    dense = view.dimensions()
    assert pruned_config(view, Shape(2, 48, 2)).text_config.num_hidden_layers == 2
    with pytest.raises(TargetError, match="layers is 1, and can be 2 to 4"):
        Shape(1, 48, 2).of_model(dense)
    assert min(shape.layers for shape in shapes_to_measure(dense)) == 3


def test_units_that_cannot_be_removed_are_named() -> None:
    """With the family's reason."""
    dense = DecoderView.of(make_model("mixtral")).dimensions()
    with pytest.raises(UnsupportedModelError, match=r"channels cannot be removed .* mixture"):
        Shape(6, 40, 2).of_model(dense)
    with pytest.raises(UnsupportedModelError, match="kv_groups cannot be removed from Mixtral"):
        Shape(6, 48, 1).of_model(dense)


def test_models_without_one_shape_are_refused() -> None:
    """Layers of several widths, and encoders."""
    with pytest.raises(UnsupportedModelError, match="have 1,000 to 1,536 MLP channels"):
        Shape.of(SMOLLM2.with_widths([1000] + 29 * [1536]))
    encoder = SMOLLM2.model_copy(update={"architecture": BERT.architecture})
    with pytest.raises(UnsupportedModelError, match="bert has no prefill"):
        Shape.of(encoder)
