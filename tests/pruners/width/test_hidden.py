"""`width` with hidden channels: scores, sizes, restoration, and what a recipe is told."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import PreTrainedModel

pytest.importorskip("torch_pruning")

from slm_plugin import prune
from slm_plugin.errors import RecipeError, TargetError, UserError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.families.suitability import complaint
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import KeepHidden, PruningPlan
from slm_plugin.pruners.width.budget import uniform_cut
from slm_plugin.pruners.width.hidden_cut import HiddenCut
from slm_plugin.pruners.width.hidden_scores import HIDDEN_SCORES, ROTATIONS, hidden_scores
from slm_plugin.pruners.width.width import Width
from slm_plugin.pruners.width.width_options import ScoreName, WidthOptions
from slm_plugin.recipe import Recipe
from slm_plugin.report.explain import explain
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.recovery.pruned import chosen_ridge, ridge_oracle, seen_by
from tests.tiny import FAMILIES, SMOLLM2, make_checkpoint, make_model, random_tokens

TOKENS = random_tokens(10, 12)
RANKINGS = sorted({*HIDDEN_SCORES, *ROTATIONS})
FITTED = (torch.arange(10) % 5 != 0).repeat_interleave(12)


def small(**changes: Any) -> PreTrainedModel:
    """A model of few layers."""
    return make_model(**{"num_hidden_layers": 2, **changes})


def strategy(ratio: float = 0.4, **options: Any) -> Width:
    """The strategy that removes a quarter of the hidden channels, without a restoration."""
    settings = {"hidden_channels": 8, "restore": "none", "multiple_of": 4, "score": "activation"}
    return Width(WidthOptions.model_validate({**settings, **options}), Target(ratio=ratio))


@torch.no_grad()
def zeroed(model: PreTrainedModel, channel: int) -> None:
    """Zero every weight of a channel."""
    for name, weight in model.named_parameters():
        if "norm" in name or "o_proj" in name or "down_proj" in name:
            weight[channel] = 0
        else:
            weight[:, channel] = 0


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("score", sorted(HIDDEN_SCORES))
def test_a_dead_channel_has_the_lowest_score(score: str, tied: bool) -> None:
    """It is 0, and nothing else is."""
    model = small(tie_word_embeddings=tied)
    zeroed(model, 5)
    found = hidden_scores(score, Session(model, calibration=TOKENS))
    assert found[5] == 0 and sorted(found)[1] > 0 and len(found) == 32


def test_activation_is_that_of_the_norms_outputs() -> None:
    """Against hooks on the norms of one whole pass."""
    model, seen = make_model("phi3", num_hidden_layers=2), []
    norms = [n for n, m in model.named_modules() if n.endswith("layernorm")]
    for name in norms:
        model.get_submodule(name).register_forward_hook(lambda _m, _g, out: seen.append(out))
    with torch.no_grad():
        model(TOKENS)
    each = [out.double().abs().mean(1).square().sum(0).sqrt() for out in seen[: len(norms)]]
    found = hidden_scores("activation", Session(model, calibration=TOKENS, batch_tokens=48))
    assert len(norms) == 4
    assert torch.allclose(torch.tensor(found), sum(each).float(), rtol=1e-4)


@pytest.mark.parametrize("tied", [False, True])
def test_weights_of_a_channel_are_counted_once(tied: bool) -> None:
    """Magnitude and Taylor against sums over all named parameters, with autograd by itself."""
    model = small(tie_word_embeddings=tied, attention_bias=True)
    session = Session(model, calibration=TOKENS, batch_tokens=48)
    found = {score: hidden_scores(score, session)[7] for score in ("magnitude", "taylor")}
    model(TOKENS, labels=TOKENS).loss.backward()
    expected = {"magnitude": 0.0, "taylor": 0.0}
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            continue
        column = "norm" not in name and "o_proj" not in name and "down_proj" not in name
        for score, value in (
            ("magnitude", weight.square()),
            ("taylor", (weight * weight.grad).abs()),
        ):
            expected[score] += (value[:, 7] if column else value[7]).sum().item()
    for score, value in expected.items():
        assert found[score] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize("score", RANKINGS)
def test_the_channels_of_the_lowest_scores_go(score: str) -> None:
    """The plan applies, has the promised size and says what it does."""
    session, pruner = Session(small(), calibration=TOKENS), strategy(hidden_score=score)
    plan = session.plan(pruner)
    (operation,) = [one for one in plan.operations if isinstance(one, KeepHidden)]
    assert plan.hidden_scores is not None
    order = sorted(range(32), key=plan.hidden_scores.__getitem__)
    assert sorted(order[8:]) == list(operation.indices)
    assert PruningPlan.parse(plan.to_json()) == plan
    assert "24 of 32 hidden channels" in plan.notes[0]
    assert "Hidden size:    32 -> 24" in explain(plan).text
    session.apply(plan)
    assert session.view.dimensions() == plan.after


@pytest.mark.parametrize("heads", ["kv_groups", "query_heads"])
@pytest.mark.parametrize("allocation", ["uniform", "owl"])
def test_mlp_channels_take_the_rest(allocation: str, heads: str) -> None:
    """To half a step of the target, whatever hidden channels and heads take of it."""
    session = Session(make_model(), calibration=TOKENS)
    before = session.view.dimensions()
    plan = session.plan(strategy(0.4, allocation=allocation, **{heads: 1}))
    assert plan.after.attention_heads < before.attention_heads
    step = before.layers * 4 * plan.after.channel_parameters
    assert abs(plan.parameters_removed - 0.4 * before.parameters) <= step / 2
    assert sum(plan.after.widths) < 6 * 48 and plan.after.hidden_size == 24
    session.apply(plan)
    assert session.view.dimensions() == plan.after


def test_the_cut_is_the_nearest_by_brute_force() -> None:
    """Among all widths that are multiples of 8, for each number of hidden channels."""
    for hidden in (0, 72, 144):
        target = Target(ratio=0.35)
        cut = uniform_cut(
            target, SMOLLM2, SMOLLM2, kv_groups=0, multiple_of=8, hidden=HiddenCut(hidden)
        )

        def missed(width: int, hidden: int = hidden) -> float:
            after = SMOLLM2.without_hidden(hidden).without_units(channels=1536 - width)
            return abs(SMOLLM2.parameters - after.parameters - 0.35 * SMOLLM2.parameters)

        assert 1536 - cut.channels == min(range(8, 1537, 8), key=missed)
        assert cut.hidden.count == hidden


@pytest.mark.parametrize(
    ("hidden", "ratio", "said"),
    [
        (576, 0.2, "hidden_channels 576 leaves none: the model has 576"),
        (144, 0.2, "144 alone removes 33,628,752 parameters, more than the 26,903,002"),
        (72, 0.8, "out of reach"),
    ],
)
def test_numbers_that_cannot_be_are_told(hidden: int, ratio: float, said: str) -> None:
    """Before any work, with what can be."""
    with pytest.raises(TargetError, match=said) as caught:
        strategy(ratio, hidden_channels=hidden).check_target(SMOLLM2, SMOLLM2)
    assert caught.value.hint


def reached(target: Target, sizes: Dimensions) -> float:
    """The ratio that a cut reaches."""
    cut = uniform_cut(target, sizes, sizes, kv_groups=0, multiple_of=8, hidden=HiddenCut(72))
    return 1 - cut.after(sizes).parameters / sizes.parameters


def test_the_reachable_range_counts_the_hidden_channels() -> None:
    """The ratio that the hint names can be asked for."""
    with pytest.raises(TargetError) as caught:
        reached(Target(ratio=0.9), SMOLLM2)
    assert caught.value.hint is not None
    most = float(caught.value.hint.split("ratio ")[1].split()[0])
    assert reached(Target(ratio=most), SMOLLM2) == pytest.approx(most, abs=2e-3)


def test_heads_that_go_with_hidden_channels_are_named_with_them() -> None:
    """Neither removes so much alone."""
    with pytest.raises(TargetError, match="query_heads 2 and the hidden channels remove ratio 0"):
        strategy(0.15, hidden_channels=48, query_heads=2).check_target(SMOLLM2, SMOLLM2)


@pytest.mark.parametrize("score", sorted({*get_args(ScoreName)} - {*RANKINGS}))
def test_other_scores_are_refused_when_the_recipe_is_read(score: str, tmp_path: Path) -> None:
    """With the reason and the ones to choose from, in one line."""
    stage = {"prune": "width", "score": score, "hidden_channels": 8, "target": {"ratio": 0.4}}
    recipe = {
        "model": {"id": str(make_checkpoint(tmp_path))},
        "calibration": {"source": "builtin"},
        "stages": [stage],
    }
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(recipe)
    (line,) = str(caught.value).splitlines()
    assert "stages.0" in line and f"score {score} ranks what one projection reads" in line
    assert line.endswith(f"set hidden_score to {', '.join(RANKINGS)}")


def test_what_needs_the_former_width_is_refused() -> None:
    """Told with the options; and to a recovery behind the stage."""
    with pytest.raises(ValueError, match="restore own runs the layers as they were"):
        strategy(restore="own")
    with pytest.raises(ValueError, match="score obs scores layers as they will be"):
        strategy(score="obs", hidden_score="activation")
    for restore in ("dense", "own"):
        with pytest.raises(ValueError, match="no restoration fits a model with operators"):
            strategy(restore=restore, hidden_score="pca_per_block")
    with pytest.raises(ValueError, match="hidden_score needs hidden_channels"):
        strategy(hidden_channels=0, hidden_score="pca")
    stage = {"prune": "width", "score": "activation", "restore": "none", "hidden_channels": 8}
    with pytest.raises(UserError, match="read 32 hidden channels and 24 are left"):
        prune(
            small(),
            None,
            [
                {**stage, "multiple_of": 4, "target": {"ratio": 0.4}},
                {"recover": "refit", "toward": "own"},
            ],
            calibration=TOKENS,
        )


@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_families_that_cannot_are_refused_by_name(name: str) -> None:
    """With a reason; the others are not."""
    record, _ = FAMILIES[name]
    config = make_model(name, num_hidden_layers=6).config.to_dict()
    said = complaint(strategy(), record, config)
    assert (not said) == record.hidden_channels
    if said and not complaint(Width, record, config):
        assert "leave hidden_channels out" in said


def test_the_restoration_fits_the_dense_states_of_the_kept_channels() -> None:
    """By hand: least squares of what the kept channels of the dense states lack."""
    dense, model = small(), small()
    stage = {"prune": "width", "score": "activation", "hidden_channels": 8, "multiple_of": 4}
    result = prune(model, None, [{**stage, "target": {"ratio": 0.4}}], calibration=TOKENS)
    (plan,) = result.plans.values()
    (kept,) = [list(one.indices) for one in plan.operations if isinstance(one, KeepHidden)]
    notes = [one for one in result.report.stages[1].recovery.notes if "o_proj" not in one]
    place, hybrid = "model.layers.0.mlp.down_proj", copy.deepcopy(model)
    bare = copy.deepcopy(dense)
    session = Session(bare, calibration=TOKENS)
    session.apply(plan)
    down = hybrid.get_submodule(place)
    with torch.no_grad():
        down.weight.copy_(bare.get_submodule(place).weight)
    features, state = seen_by(hybrid, place, TOKENS), seen_by(hybrid, "model.layers.1", TOKENS)
    target = seen_by(dense, "model.layers.1", TOKENS)[:, kept]
    change = ridge_oracle(features[FITTED], (target - state)[FITTED], chosen_ridge(notes[0]))
    found = model.get_submodule(place).weight.detach().double()
    expected = bare.get_submodule(place).weight.detach().double() + change.T
    assert torch.allclose(found, expected, atol=1e-4)


def test_later_stages_compare_with_the_channels_that_are_left() -> None:
    """A width stage by `obs` and a refit behind it lower the error in the kept channels."""
    model = small()
    stages = [
        {
            "prune": "width",
            "score": "activation",
            "hidden_channels": 8,
            "restore": "none",
            "multiple_of": 4,
            "target": {"ratio": 0.3},
        },
        {"prune": "width", "score": "obs", "multiple_of": 4, "target": {"ratio": 0.2}},
    ]
    dense = copy.deepcopy(model)
    result = prune(model, None, stages, calibration=TOKENS)
    first, _ = result.plans.values()
    kept = next(list(one.indices) for one in first.operations if isinstance(one, KeepHidden))
    bare = prune(
        copy.deepcopy(dense),
        None,
        [stages[0], {**stages[1], "restore": "none"}],
        calibration=TOKENS,
    )
    wanted = seen_by(dense, "model.norm", TOKENS)[:, kept]
    errors = [
        float((seen_by(one, "model.norm", TOKENS) - wanted).norm()) for one in (model, bare.model)
    ]
    assert errors[0] < errors[1]
    assert DecoderView.of(model).dimensions().hidden_size == 24
