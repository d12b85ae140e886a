"""Restoration inside a width stage: the refit of a recipe, toward either target, on every path."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

pytest.importorskip("torch_pruning")

from slm_plugin import prune
from slm_plugin.comparison.run import compare
from slm_plugin.errors import CalibrationError, RecipeError, UserError
from slm_plugin.models.families.llama import LLAMA
from slm_plugin.models.families.suitability import complaint
from slm_plugin.models.loading import ModelSource
from slm_plugin.pipeline import apply_plan
from slm_plugin.plans import KeepChannels, PruningPlan
from slm_plugin.pruners.width.width import Width
from slm_plugin.pruners.width.width_options import WidthOptions
from slm_plugin.recipe import Recipe
from slm_plugin.recovery.closed_form.refit import Refit, RefitOptions
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.recovery.pruned import chosen_ridge, ridge_oracle, seen_by
from tests.tiny import make_model, make_tokenizer, random_tokens

TOKENS = random_tokens(10, 12)
FITTED = (torch.arange(10) % 5 != 0).repeat_interleave(12)


def stage(**options: Any) -> dict[str, Any]:
    """A small width stage by a score that is quick."""
    return {
        "prune": "width",
        "score": "wanda_sp",
        "multiple_of": 4,
        "target": {"ratio": 0.2},
        **options,
    }


def small(**changes: Any) -> PreTrainedModel:
    """A model of few layers."""
    return make_model(num_hidden_layers=3, **changes)


def pruned(model: PreTrainedModel, *stages: dict[str, Any]) -> Any:
    """The result of some stages on a model, which changes."""
    return prune(model, None, list(stages), calibration=TOKENS)


def weights(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """All weights by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def assert_same(one: PreTrainedModel, other: PreTrainedModel) -> None:
    """No bit differs."""
    found, wanted = weights(one), weights(other)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("restore", ["dense", "own"])
@pytest.mark.parametrize("heads", [{}, {"kv_groups": 1}, {"query_heads": 1}])
def test_it_is_the_refit_of_a_recipe(restore: str, heads: dict[str, int]) -> None:
    """To the last bit, and a stage of its own in the report; both targets are the default's."""
    inside, behind, bare = small(), small(), small()
    refit = {"recover": "refit", "toward": restore, "o_proj": bool(heads)}
    result = pruned(inside, stage(restore=restore, **heads))
    pruned(behind, stage(restore="none", **heads), refit)
    pruned(bare, stage(restore="none", **heads))
    assert_same(inside, behind)
    assert not torch.equal(
        inside.model.layers[2].mlp.down_proj.weight, bare.model.layers[2].mlp.down_proj.weight
    )
    assert [one.name for one in result.report.stages] == ["width", "refit"]
    (made,) = result.plans.values()
    assert made.followed_by == refit
    assert PruningPlan.parse(made.to_json()) == made


def test_the_plain_refit_is_the_default() -> None:
    """`recover: refit` without options, toward the dense model's states."""
    inside, behind = small(), small()
    pruned(inside, stage())
    pruned(behind, stage(restore="none"), {"recover": "refit"})
    assert_same(inside, behind)


def test_the_layers_own_output_is_fitted_by_least_squares() -> None:
    """By hand: kept columns toward what all columns gave on the input that the layer has now."""
    dense, model = small(), small()
    result = pruned(model, stage(restore="own"))
    (made,) = result.plans.values()
    notes = result.report.stages[1].recovery.notes
    for layer in (0, 2):
        place = f"model.layers.{layer}.mlp.down_proj"
        hybrid = copy.deepcopy(model)
        # The dense layer above the pruned and restored ones.
        hybrid.model.layers[layer] = copy.deepcopy(dense.model.layers[layer])
        every = seen_by(hybrid, place, TOKENS)
        operation = made.operations[layer]
        assert isinstance(operation, KeepChannels)
        weight = dense.get_submodule(place).weight.detach().double()
        kept = list(operation.indices)
        missing = every @ weight.T - every[:, kept] @ weight[:, kept].T
        change = ridge_oracle(every[FITTED][:, kept], missing[FITTED], chosen_ridge(notes[layer]))
        found = model.get_submodule(place).weight.detach().double()
        assert torch.allclose(found, weight[:, kept] + change.T, atol=1e-4)


def test_both_targets_agree_on_the_lowest_layer() -> None:
    """Its input is the dense model's; above it the inputs differ."""
    dense, own = small(), small()
    pruned(dense, stage())
    pruned(own, stage(restore="own"))
    lowest = [one.model.layers[0].mlp.down_proj.weight for one in (dense, own)]
    higher = [one.model.layers[2].mlp.down_proj.weight for one in (dense, own)]
    assert torch.allclose(*lowest, atol=1e-5) and not torch.allclose(*higher, atol=1e-3)


def test_a_constant_channel_goes_into_the_bias() -> None:
    """FLAP's compensation: where the class has a bias, the fit moves a channel's mean there."""
    model = make_model(mlp_bias=True, num_hidden_layers=1)
    with torch.no_grad():
        # Channels 4 to 7 always give 1.5 silu(1.5): they matter, and only by their mean.
        for name in ("gate_proj", "up_proj"):
            linear = model.model.layers[0].mlp.get_submodule(name)
            linear.weight[4:8] = 0
            linear.bias[4:8] = 1.5
        model.model.layers[0].mlp.down_proj.weight[:, 4:8] *= 3
    expected = model(TOKENS).logits.detach()
    column = model.model.layers[0].mlp.down_proj.weight[:, 4:8].detach().sum(1)
    bias = model.model.layers[0].mlp.down_proj.bias.detach().clone()
    bare = copy.deepcopy(model)
    removal = {"score": "flap", "target": {"parameters": model.num_parameters() - 388}}
    result = pruned(model, stage(**removal))
    pruned(bare, stage(restore="none", **removal))
    (made,) = result.plans.values()
    (operation,) = made.operations
    assert set(range(48)) - set(operation.kept) == {4, 5, 6, 7}
    moved = model.model.layers[0].mlp.down_proj.bias.detach() - bias
    constant = 1.5 * float(torch.nn.functional.silu(torch.tensor(1.5)))
    assert torch.allclose(moved, constant * column, atol=1e-2)
    assert not torch.allclose(bare(TOKENS).logits, expected, atol=0.5)
    assert torch.allclose(model(TOKENS).logits, expected, atol=1e-2)


def test_a_depth_stage_before_keeps_its_targets() -> None:
    """The dense states of the layers that are left; a merge is no obstacle to the own output."""
    merge = {"prune": "slm", "target": {"layers_removed": 1}, "merge_rule": "mean"}
    for restore in ("dense", "own"):
        inside, behind = small(), small()
        pruned(inside, merge, stage(restore=restore))
        pruned(behind, merge, stage(restore="none"), {"recover": "refit", "toward": restore})
        assert_same(inside, behind)


def test_toward_its_own_output_needs_a_width_stage() -> None:
    """Without one no layer became narrower; and a session has to keep the layers first."""
    model = small()
    drop = {"prune": "deepest", "target": {"layers_removed": 1}}
    result = pruned(model, drop, {"recover": "refit", "toward": "own"})
    assert "nothing to repair" in result.report.stages[1].summary
    session = Session(small(), calibration=TOKENS)
    with pytest.raises(UserError, match=r"session\.expect"):
        session.recover(Refit(RefitOptions(toward="own")))


def test_a_comparison_restores_every_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The restored method has the figures of the bare one with a refit."""
    monkeypatch.setenv("SLM_PLUGIN_CACHE", str(tmp_path / "cache"))
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{number}" for number in random_tokens(6, 16).flatten().tolist()))
    bare = {name: value for name, value in stage(restore="none").items() if name != "target"}
    report = compare(
        {
            "methods": [
                {**bare, "restore": "dense"},
                {**bare, "recover": ["none", {"recover": "refit"}]},
            ],
            "targets": [{"ratio": 0.2}],
            "evaluate": [{"perplexity": {"source": str(text), "length": 16}}],
        },
        model=small(),
        tokenizer=make_tokenizer(),
        calibration=TOKENS,
    )
    _, restored, plain, refitted = [cell.measured["perplexity"][0].value for cell in report.cells]
    assert restored == refitted != plain
    assert report.cells[1].recovering is not None and report.cells[2].recovering is None


def test_a_plan_alone_only_removes_and_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], reload_here: None
) -> None:
    """It holds indices, and its restoration needs data."""
    model, bare = small(), small()
    model.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (made,) = pruned(model, stage()).plans.values()
    folder = apply_plan(made, ModelSource(id=str(tmp_path / "model")), tmp_path / "applied")
    assert "width is followed by `recover: refit` in a recipe" in capsys.readouterr().err
    pruned(bare, stage(restore="none"))
    assert_same(type(bare).from_pretrained(folder), bare)


def recipe(model: Path, **options: Any) -> dict[str, Any]:
    """A recipe of one stage without calibration data."""
    return {"model": {"id": str(model)}, "stages": [stage(**options)]}


def test_magnitudes_without_data_are_not_restored_silently(tmp_path: Path) -> None:
    """The reader of the recipe is told what to add or to leave out."""
    small().save_pretrained(tmp_path)
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(recipe(tmp_path, score="magnitude"))
    assert str(caught.value).endswith(
        "stages.0: 'width' needs calibration data; add `calibration: {source: builtin}` or set "
        "`restore: none`"
    )
    assert len(str(caught.value).splitlines()) == 1
    made = Recipe.from_dict(recipe(tmp_path, score="magnitude", restore="none"))
    assert len(made.stages) == 1
    with pytest.raises(CalibrationError, match="or set `restore: none`"):
        prune(small(), None, "width", ratio=0.2, score="magnitude")


def test_what_cannot_be_fitted_is_told_with_the_way_out() -> None:
    """A family whose MLP is no linear map loses channels, but is not restored."""
    family = replace(LLAMA, no_fit="its projections are no linear maps")

    def said(restore: str) -> str:
        made = WidthOptions.model_validate({"restore": restore})
        return complaint(Width(made, Target(ratio=0.2)), family, {})

    assert said("dense").endswith("its projections are no linear maps; set `restore: none`")
    assert said("own") == said("dense") and not said("none")


@pytest.mark.parametrize(
    ("options", "warnings"),
    [
        ({"score": "obs"}, ["ranks 48 columns on 40 tokens", "fits 28 columns on 20 tokens"]),
        ({"score": "leverage", "restore": "none"}, ["ranks 48 columns on 40 tokens"]),
        ({"score": "flap"}, ["fits 28 columns on 20 tokens"]),
        ({"score": "flap", "restore": "none"}, []),
    ],
)
def test_few_tokens_are_told(options: dict[str, Any], warnings: list[str]) -> None:
    """With both numbers, in the plan; with tokens enough there is nothing to say."""
    pruner = Width(WidthOptions.model_validate({"multiple_of": 4, **options}), Target(ratio=0.2))

    def told(tokens: torch.Tensor) -> list[str]:
        made = Session(small(), calibration=tokens).plan(pruner)
        return [warning for warning in made.warnings if "tokens" in warning]

    found = told(random_tokens(2, 20))
    assert len(found) == len(warnings) and not told(TOKENS)
    for warning, said in zip(found, warnings, strict=True):
        assert said in warning and "raise `samples` or `length`" in warning
