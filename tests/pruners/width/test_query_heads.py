"""Query heads as units: as many of every KV group, by every score, with every refusal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError

pytest.importorskip("torch_pruning")

from slm_plugin.errors import RecipeError, TargetError, UnsupportedModelError
from slm_plugin.inspection import inspection
from slm_plugin.models.families import family_of
from slm_plugin.models.families.suitability import refuse_unsuited
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import KeepQueryHeads, PruningPlan, UnitScores
from slm_plugin.pruners.gradients import gradient_moments
from slm_plugin.pruners.input_sums import layer_inputs
from slm_plugin.pruners.width.brain_surgeon import eliminate
from slm_plugin.pruners.width.budget import Cut, uniform_cut
from slm_plugin.pruners.width.heads import HeadUnit
from slm_plugin.pruners.width.importance import magnitude, taylor, taylor_second
from slm_plugin.pruners.width.layer_scores import BY_COLUMN, head_scores
from slm_plugin.pruners.width.uniform import operations_of
from slm_plugin.pruners.width.width import Width
from slm_plugin.pruners.width.width_options import ScoreName, WidthOptions
from slm_plugin.recipe import Recipe
from slm_plugin.report import pictures
from slm_plugin.report.explain import explain
from slm_plugin.report.numbers import spans
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.pruners.width.test_brain_surgeon import cost, damped, problem, restored
from tests.tiny import SMOLLM2, make_checkpoint, make_model, random_tokens

TOKENS = random_tokens(10, 12)


def width(ratio: float = 0.25, **options: Any) -> Width:
    """The strategy with small steps that removes one query head of every KV group."""
    given = {"query_heads": 1, "multiple_of": 4, "restore": "none", **options}
    return Width(WidthOptions.model_validate(given), Target(ratio=ratio))


def session_of(**changes: Any) -> Session:
    """A model of two KV groups of three query heads, whose head count every release loads."""
    sizes = {"num_attention_heads": 6, "num_hidden_layers": 3, **changes}
    return Session(make_model("qwen2", **sizes), calibration=TOKENS, batch_tokens=48)


def heads_of(plan: PruningPlan) -> dict[int, tuple[int, ...]]:
    """The query heads that each layer keeps."""
    return {op.layer: op.kept for op in plan.operations if isinstance(op, KeepQueryHeads)}


def parts_of(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive runs of one size."""
    return (values[first : first + size] for first in range(0, len(values), size))


@pytest.mark.parametrize("score", get_args(ScoreName))
def test_every_score_removes_the_lowest_of_every_group(score: ScoreName) -> None:
    """The plan has the promised size, applies, and leaves the cache as it is."""
    session = session_of()
    few = {"steps": 2} if score == "policy_gradient" else {}
    plan = session.plan(width(score=score, **few))
    kept = heads_of(plan)
    assert len(kept) == 3 and {len(one) for one in kept.values()} == {4}
    scored = [one for one in plan.scores if one.unit == "query_head"]
    assert [one.layer for one in scored] == [0, 1, 2]
    for one in scored:
        for group, values in enumerate(parts_of(one.scores, 3)):
            lowest = 3 * group + min(range(3), key=values.__getitem__)
            assert {*kept[one.layer]} & {*range(3 * group, 3 * group + 3)} == (
                {*range(3 * group, 3 * group + 3)} - {lowest}
            )
    assert (plan.after.attention_heads, plan.after.kv_heads) == (4, 2)
    assert plan.after.intermediate_size < 48
    assert PruningPlan.parse(plan.to_json()) == plan
    session.apply(plan)
    assert session.view.dimensions() == plan.after


def test_the_choice_is_the_best_of_all_that_leave_groups_alike() -> None:
    """By trying every set of heads: the kept ones have the largest sum of scores."""
    generator = torch.Generator().manual_seed(4)
    before = SMOLLM2.model_copy(update={"attention_heads": 8, "kv_heads": 2})
    for fewer in (1, 2, 3):
        scores = torch.rand(8, generator=generator, dtype=torch.float64).tolist()
        units = UnitScores(layer=0, unit="query_head", scores=tuple(scores))
        (operation,) = operations_of(units, Cut(0, 0, query_heads=fewer), before)
        allowed = [
            chosen
            for chosen in itertools.combinations(range(8), 8 - 2 * fewer)
            if sum(head < 4 for head in chosen) == 4 - fewer
        ]
        assert operation.kept == max(allowed, key=lambda heads: sum(scores[h] for h in heads))


@pytest.mark.parametrize("score", ["magnitude", "taylor", "taylor_second"])
def test_a_group_is_its_query_heads_and_its_key_and_value(score: str) -> None:
    """The heads' weights and those of k and v are all that the score of a KV group adds up."""
    view, batches = session_of().view, TOKENS.split(5)
    means, squares = gradient_moments(view, batches)
    scored: dict[str, Callable[[HeadUnit], tuple[UnitScores, ...]]] = {
        "magnitude": lambda heads: magnitude(view, heads),
        "taylor": lambda heads: taylor(view, batches, heads),
        "taylor_second": lambda heads: taylor_second(view, batches, heads),
    }
    groups, heads = scored[score]("kv_group"), scored[score]("query_head")
    assert [one.unit for one in heads] == ["mlp_channel", "query_head"] * 3
    for layer, (whole, single) in enumerate(zip(groups[1::2], heads[1::2], strict=True)):
        modules = view.projections(view.layers[layer])
        for group, values in enumerate(parts_of(single.scores, 3)):
            rest = 0.0
            for name in ("k_proj", "v_proj"):
                weight = modules[name].weight.detach()
                salience = {
                    "magnitude": weight**2,
                    "taylor": (weight * means[layer][name]).abs(),
                    "taylor_second": weight**2 * squares[layer][name],
                }[score]
                rest += float(salience[8 * group : 8 * group + 8].sum())
            assert sum(values) + rest == pytest.approx(whole.scores[group], rel=1e-4)


@pytest.mark.parametrize("score", sorted(BY_COLUMN))
def test_all_heads_of_a_group_score_as_the_group(score: str) -> None:
    """Scores of columns add up, so removing every head is removing the group."""
    session = session_of()
    before = session.view.dimensions()
    for layer in layer_inputs(session):
        inputs = layer.read_by("o_proj")
        single = head_scores(score, inputs, Cut(0, 0, query_heads=1), before)
        whole = head_scores(score, inputs, Cut(0, 1), before)
        assert torch.allclose(single.reshape(2, 3).sum(1), whole, rtol=1e-12)


def test_obs_takes_the_best_head_of_the_groups_that_lost_fewest() -> None:
    """Every step by trying all heads that may go; the errors are true, and groups stay alike."""
    weight, inputs = problem(5, 12)
    matrix = damped(inputs, 1e-2)
    found = eliminate(weight, inputs.T @ inputs, ridge=1e-2, most=6, size=2, parts=2)

    def error(gone: Sequence[int]) -> float:
        kept = [column for column in range(12) if column // 2 not in gone]
        return cost(weight, restored(weight, matrix, kept), matrix)

    for step in range(6):
        gone = found.order[:step]
        lost = [sum(head // 3 == group for head in gone) for group in range(2)]
        assert max(lost) - min(lost) <= 1
        allowed = [h for h in range(6) if h not in gone and lost[h // 3] == min(lost)]
        assert found.order[step] == min(allowed, key=lambda head: error([*gone, head]))
        if step < 5:
            assert found.errors[step] == pytest.approx(error(found.order[: step + 1]), rel=1e-8)


def test_dead_heads_go_first_but_not_more_than_a_group_may_lose() -> None:
    """Of two dead heads of one group one goes for nothing; the other group gives its own."""
    weight, inputs = problem(6, 12)
    inputs[:, :4] = 0
    gram = inputs.T @ inputs
    found = eliminate(weight, gram, ridge=1e-2, most=2, size=2, parts=2)
    assert found.order[0] == 0 and found.errors[0] == 0 and found.order[1] >= 3
    assert found.errors[1] > 0
    every = eliminate(weight, gram, ridge=1e-2, most=6, size=2, parts=2)
    assert sorted(every.order) == [*range(6)] and every.errors[:2] == [0, 0]
    # The dead columns change no other error.
    assert every.errors[2] == pytest.approx(found.errors[1], rel=1e-9)


def test_probabilities_of_every_group_add_up() -> None:
    """To the heads that stay of it."""
    plan = session_of().plan(width(score="policy_gradient", steps=3, learning_rate=0.1))
    for one in plan.scores:
        if one.unit == "query_head":
            for values in parts_of(one.scores, 3):
                assert sum(values) == pytest.approx(2, abs=1e-6)
                assert min(values) >= 0 and max(values) <= 1


@pytest.mark.parametrize("ratio", [0.06, 0.1, 0.3])
@pytest.mark.parametrize("fewer", [1, 2])
def test_no_other_cut_comes_nearer(ratio: float, fewer: int) -> None:
    """Channels take what the heads leave of the target."""
    wanted = ratio * SMOLLM2.parameters
    allowed = [Cut(channels, 0, query_heads=fewer) for channels in range(0, 1536, 8)]

    def distance(cut: Cut) -> float:
        return abs(SMOLLM2.parameters - cut.after(SMOLLM2).parameters - wanted)

    def cut() -> Cut:
        return uniform_cut(
            Target(ratio=ratio), SMOLLM2, SMOLLM2, kv_groups=0, multiple_of=8, query_heads=fewer
        )

    if 30 * 3 * fewer * SMOLLM2.query_head_parameters > wanted:
        with pytest.raises(TargetError, match=f"query_heads {fewer} alone removes ratio 0"):
            cut()
        return
    assert distance(cut()) == min(map(distance, allowed))
    with pytest.raises(TargetError, match="out of reach") as refused:
        uniform_cut(Target(ratio=0.9), SMOLLM2, SMOLLM2, kv_groups=0, multiple_of=8, query_heads=1)
    assert "with 1 of 3 query heads of each KV group removed at most ratio" in refused.value.hint


def test_layers_of_different_channels_keep_as_many_heads() -> None:
    """An allocation spreads the channels alone, and counts the heads."""
    session = session_of()
    plan = session.plan(width(allocation="owl", score="wanda_sp", multiple_of=2))
    assert plan.after.layer_widths
    assert {len(kept) for kept in heads_of(plan).values()} == {4}
    wanted = 0.25 * session.original.parameters
    assert abs(plan.parameters_removed - wanted) <= plan.before.channel_parameters
    session.apply(plan)
    assert session.view.dimensions() == plan.after


def test_groups_and_heads_go_one_after_the_other() -> None:
    """In two stages, in both orders, to the same size."""
    sizes = set()
    for first, second in itertools.permutations(({"kv_groups": 1, "query_heads": 0}, {})):
        session = session_of(num_attention_heads=8, num_key_value_heads=4)
        for options in (first, second):
            plan = session.plan(width(0.2, score="magnitude", **options))
            session.apply(plan)
            assert session.view.dimensions() == plan.after
        sizes.add((plan.after.attention_heads, plan.after.kv_heads))
    assert sizes == {(3, 3)}


@pytest.mark.parametrize(
    ("changes", "query_heads", "message", "hint"),
    [
        ({}, 3, "query_heads 3 leaves none: every KV group has 3 query heads", "at most 2"),
        (
            {"num_attention_heads": 4, "num_key_value_heads": 4},
            1,
            "query_heads 1 leaves none: every key/value head has one query head",
            "kv_groups removes both together",
        ),
    ],
)
def test_what_a_group_has_not_is_refused_when_read(
    changes: dict[str, Any], query_heads: int, message: str, hint: str
) -> None:
    """Before weights are read by the config, and by the model's own sizes before any work."""
    session = session_of(**changes)
    sizes = session.view.dimensions()
    pruner = width(query_heads=query_heads)
    with pytest.raises(TargetError, match=message) as refused:
        pruner.check_target(sizes, sizes)
    assert hint in refused.value.hint
    uneven = width(query_heads=query_heads, allocation="alpha")
    with pytest.raises(TargetError, match=message):
        uneven.check_target(sizes, sizes)
    with pytest.raises(UnsupportedModelError, match=message) as early:
        refuse_unsuited([pruner], session.view.family, session.model.config.to_dict())
    assert hint in str(early.value)
    refuse_unsuited([pruner], session.view.family, {"num_attention_heads": "many"})


def test_a_recipe_says_what_its_model_has_not(tmp_path: Any) -> None:
    """In one line with the place."""
    make_checkpoint(tmp_path / "m")
    data = {
        "model": {"id": str(tmp_path / "m")},
        "calibration": {"source": "builtin"},
        "stages": [{"prune": "width", "target": {"ratio": 0.2}, "query_heads": 2}],
    }
    with pytest.raises(RecipeError, match=r"stages\.0: .*every KV group has 2 query heads; at mo"):
        Recipe.from_dict(data)


def test_families_whose_heads_are_not_independent_are_refused() -> None:
    """With the reason that their record gives; channels alone are fine."""
    view = DecoderView.of(make_model("olmo2"))
    config = view.config.to_dict()
    with pytest.raises(UnsupportedModelError, match=r"norms run over all heads.*query_heads"):
        refuse_unsuited([width()], family_of("Olmo2ForCausalLM"), config)
    refuse_unsuited([width(query_heads=0)], view.family, config)
    sizes = view.dimensions()
    with pytest.raises(TargetError, match="no query head of Olmo2ForCausalLM can be removed"):
        width().check_target(sizes, sizes)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"query_heads": 1, "kv_groups": 1}, "remove from the same attention"),
        ({"query_heads": 1, "kv_groups": "auto"}, "a stage for each"),
        ({"query_heads": -1}, "greater than or equal to 0"),
        ({"query_heads": True}, "valid integer"),
        ({"query_heads": "auto"}, "valid integer"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    """When the recipe is read."""
    with pytest.raises(ValidationError, match=message):
        WidthOptions.model_validate(options)


def test_the_restoration_fits_the_attention_too() -> None:
    """Where heads go, `o_proj` reads fewer columns."""
    for options, o_proj in (({}, True), ({"query_heads": 0}, False)):
        made = width(restore="dense", **options)
        assert made.followed_by == {"recover": "refit", "toward": "dense", "o_proj": o_proj}


def test_reports_say_which_heads_stay() -> None:
    """In the text and the table of `explain`, in the picture, in the plan's note, in `inspect`."""
    session = session_of()
    plan = session.plan(width(score="magnitude"))
    told = explain(plan)
    assert "Heads:          6 -> 4 query, 2 -> 2 key/value" in told.text
    (table,) = told.tables
    kept = heads_of(plan)[1]
    cells = [cell.text for cell in table.rows[1].cells]
    assert cells[2:] == [f"2 of 2: {spans((0, 1))}", f"4 of 6: {spans(kept)}"]
    channels = plan.after.intermediate_size
    assert plan.notes[0] == (
        f"every layer keeps {channels} of 48 MLP channels and 2 of 3 query heads of each of 2 "
        "KV groups"
    )
    found = inspection(session.view)["units"]["query_head in every layer"]
    assert found == {"count": 6, "parameters": 3 * (2 * 32 + 1) * 8}
    alone = DecoderView.of(make_model(num_hidden_layers=1, num_key_value_heads=4))
    assert "query_head in every layer" not in inspection(alone)["units"]
    pytest.importorskip("matplotlib")
    svg = pictures.widths(plan)
    assert all(f'id="widths-query_head-{layer}"' in svg for layer in range(3))
    assert "widths-kv_group" not in svg
