"""Exchanges on finished plans: against brute force, whole repaired models, and planted layers."""

from __future__ import annotations

import copy
import itertools
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from slm_plugin.errors import PlanError, TargetError
from slm_plugin.models.families import family_of
from slm_plugin.plans import DropLayers
from slm_plugin.pruners.depth.repaired import Repaired
from slm_plugin.pruners.depth.repaired_options import RepairedOptions
from slm_plugin.pruners.depth.search.exchanges import Tried, exchanged, polished
from slm_plugin.pruners.depth.search.repaired_sets import RepairedSets, repaired_sets
from slm_plugin.registry import pruners
from slm_plugin.target import Target
from tests.pruners.depth.strategies import (
    FITS,
    RECOVERY,
    judged_on,
    mean_loss,
    planned,
    removed,
    session_of,
)
from tests.recovery.pruned import TOKENS, UNFITTED, pruned, recover
from tests.tiny import make_model

START: dict[str, Any] = {"start": {"prune": "block_influence"}, "polish": 4}


def loss_without(dropped: tuple[int, ...], repair: str = "boundary", **sizes: int) -> float:
    """Loss of the model that surgery and the recovery make."""
    session = pruned(make_model(**sizes), DropLayers(indices=dropped))  # type: ignore[arg-type]
    name, options = RECOVERY[repair]
    # Below the lowest layer that is left there is nothing to fit.
    if repair not in FITS or dropped != tuple(range(len(dropped))):
        recover(name, session, **options)
    return mean_loss(session.model, judged_on(repair))


def judge_of(repair: str, **sizes: int) -> RepairedSets:
    """Judges sets by the loss, in memory."""
    # Three samples a batch, of which one is held out: the first, the last, or the middle one.
    model = make_model(**sizes)  # type: ignore[arg-type]
    session = session_of(model, calibration=TOKENS, batch_tokens=48)
    with repaired_sets(session, repair, "loss", whole=True) as judge:
        return judge


@pytest.mark.parametrize("repair", RECOVERY)
def test_a_set_is_judged_by_the_loss_of_the_repaired_model(repair: str) -> None:
    """Whatever set was judged before it: gaps in a row, at both ends, and below shared ones."""
    sizes = {"num_hidden_layers": 7}
    judge = judge_of(repair, **sizes)
    before = mean_loss(make_model(**sizes), judged_on(repair))  # type: ignore[arg-type]
    best = judge((1, 4), None)
    for dropped in [(1, 5), (0, 4), (3, 4), (0, 1), (0, 6), (0, 1, 5), (1, 2, 6), (4, 5, 6)]:
        tried = judge(dropped, best)
        expected = loss_without(dropped, repair, **sizes) - before
        assert -tried.value == pytest.approx(expected, abs=3e-5)
        assert tried.value == judge_of(repair, **sizes)(dropped, None).value
        # Each is the base of the next.
        best = tried


@pytest.mark.parametrize("start", ["deepest", "block_influence"])
def test_exchanges_that_reach_every_set_find_the_best(start: str) -> None:
    """Of a model of five layers, as removing and repairing every pair tells."""
    sizes = {"num_hidden_layers": 5}
    losses = {pair: loss_without(pair, **sizes) for pair in itertools.combinations(range(5), 2)}
    options = {"polish": 9, "judge": "loss", "screen": "all", "start": {"prune": start}}
    plan = planned("repaired", make_model(**sizes), 2, tokens=TOKENS, **options)  # type: ignore[arg-type]
    assert tuple(sorted(removed(plan))) == min(losses, key=losses.__getitem__)
    tried = (*plan.trials, *plan.explored)
    found = {tuple(sorted({t.first, *(low for low, _ in t.committed)})): t for t in tried}
    assert found.keys() == losses.keys() and len(tried) == len(losses)
    dense = mean_loss(make_model(**sizes), UNFITTED)  # type: ignore[arg-type]
    for pair, trial in found.items():
        assert -trial.similarity == pytest.approx(losses[pair] - dense, abs=3e-5)


@pytest.mark.parametrize("start", [None, "deepest", "shapley"])
def test_a_polished_plan_is_no_worse(start: str | None) -> None:
    """Than its start, in the loss of the repaired model; each accepted exchange is better."""
    options: dict[str, Any] = {"polish": 6, "judge": "loss", "screen": "all"}
    begun = planned(
        start or "repaired",
        make_model(),
        3,
        tokens=TOKENS,
        **({} if start else {"judge": "loss", "screen": "all"}),
    )
    if start:
        options["start"] = {"prune": start}
    plan = planned("repaired", make_model(), 3, tokens=TOKENS, **options)
    values = [trial.similarity for trial in plan.trials]
    assert values == sorted(set(values))
    least = loss_without(tuple(sorted(removed(begun))))
    assert loss_without(tuple(sorted(removed(plan)))) <= least + 1e-5
    assert len(plan.explored) + len(values) == 7
    assert "over the 3 calibration samples that no repair is fitted to" in plan.notes[1]


def make_opposite(model: PreTrainedModel) -> None:
    """Layers 1 and 3 undo each other, 2 does less than one of them, and all others do more."""
    layers = model.model.layers
    with torch.no_grad():
        for index, size in ((1, 0.1), (2, 0.08), (0, 1), (4, 1), (5, 1)):
            layers[index].self_attn.o_proj.weight.zero_()
            layers[index].mlp.down_proj.weight.mul_(size)
        layers[3].load_state_dict(copy.deepcopy(layers[1].state_dict()))
        layers[3].mlp.down_proj.weight.neg_()


def test_one_exchange_mends_what_a_greedy_search_gets_wrong() -> None:
    """The layer that goes first is none of the two that go best."""
    model = make_model()
    make_opposite(model)
    options: dict[str, Any] = {"repair": "none", "judge": "kl", "screen": "all"}
    greedy = planned("repaired", model, 2, tokens=TOKENS, **options)
    assert removed(greedy)[0] == 2 and removed(greedy)[1] in (1, 3)
    plan = planned("repaired", model, 2, tokens=TOKENS, polish=14, **options)
    assert plan.operations == (DropLayers(indices=(1, 3)),)


def test_a_plan_that_an_exchange_changed_has_no_smaller_ones() -> None:
    """It is one operation, and says so; a plan that stays can be cut as before."""
    model = make_model()
    make_opposite(model)
    options: dict[str, Any] = {"repair": "none", "judge": "kl", "screen": "all"}
    plan = planned("repaired", model, 2, tokens=TOKENS, polish=14, **options)
    assert any("no part of them is a smaller plan" in note for note in plan.notes)
    with pytest.raises(PlanError, match="the plan has 1 operation, not 2"):
        plan.upto(2)
    best = {"prune": "repaired", **options, "polish": 14}
    again = planned("repaired", model, 2, tokens=TOKENS, polish=14, start=best, **options)
    assert again.operations == plan.operations
    stays = planned("repaired", model, 1, tokens=TOKENS, polish=5, **options)
    assert stays.operations == (DropLayers(indices=(2,)),)
    assert not any("smaller plan" in note for note in stays.notes)
    assert any("5 exchanges were tried" in note and "0 accepted" in note for note in stays.notes)


@pytest.mark.parametrize("more", [{}, {"start": {"prune": "deepest"}}])
def test_a_killed_search_goes_on(tmp_path: Path, more: dict[str, Any]) -> None:
    """Every beginning of the journals ends in the same plan, and the same files."""

    def plan() -> str:
        session = session_of(make_model(), calibration=TOKENS, journals=tmp_path)
        options = RepairedOptions(polish=8, **more)
        return Repaired(options, Target(layers_removed=3)).plan(session).to_json()

    expected = plan()
    files = {file: file.read_text() for file in tmp_path.glob("*.jsonl")}
    assert len(files) == (1 if more else 3)
    assert plan() == expected and files == {file: file.read_text() for file in files}
    for share in (0.2, 0.5, 0.8):
        for file, whole in files.items():
            lines = whole.splitlines(keepends=True)
            file.write_text("".join(lines[: int(share * len(lines))]))
        assert plan() == expected
        assert files == {file: file.read_text() for file in files}


def test_other_seeds_try_other_exchanges() -> None:
    """And the same seed the same ones."""
    found = []
    for seed in (1, 1, 2):
        session = session_of(make_model(num_hidden_layers=8), calibration=TOKENS, seed=seed)
        options = RepairedOptions(repair="none", **START)
        found.append(Repaired(options, Target(layers_removed=3)).plan(session).explored)
    assert found[0] == found[1] != found[2]


def test_an_exchange_is_of_one_to_three_layers() -> None:
    """As many go as come back, and only layers that may go."""
    generator, counts = random.Random(0), []
    for _ in range(300):
        new = exchanged((2, 5, 6, 9), (3, 4, 7, 8), generator)
        assert len(new) == 4 and new == tuple(sorted({*new})) and {*new} <= {*range(2, 10)}
        counts.append(len({*new} - {2, 5, 6, 9}))
    # The smaller of two uniform draws from 1 to 3: 5, 3 and 1 of 9.
    assert [counts.count(size) > 0 for size in (1, 2, 3, 4)] == [True, True, True, False]
    assert counts.count(1) == pytest.approx(300 * 5 / 9, abs=40)


def test_a_search_ends_where_nothing_is_left_to_try() -> None:
    """Every set once, none twice; and nothing where no other layer may go."""
    judged: list[tuple[int, ...]] = []

    def judge(dropped: tuple[int, ...], best: Tried | None) -> Tried:
        judged.append(dropped)
        return Tried(dropped, dropped[0], 0.0)

    best, others = polished((1, 2), range(1, 5), 100, 0, judge)
    assert sorted(judged) == list(itertools.combinations(range(1, 5), 2))
    # No strict improvement.
    assert len(best) == 1 and len(others) == 5
    assert polished((1, 2), (1, 2), 100, 0, judge)[1] == []


def test_protected_layers_stay() -> None:
    """Exchanges take none of them, and a start that drops one is refused."""
    ends = {"protect_first": 2, "protect_last": 1}
    start = {"prune": "block_influence", **ends}
    plan = planned(
        "repaired",
        make_model(num_hidden_layers=7),
        2,
        repair="none",
        polish=50,
        start=start,
        **ends,
    )
    tried = (*plan.trials, *plan.explored)
    assert len(tried) == 6
    assert {low for t in tried for low, _ in (*t.committed, (t.first, t.last))} == {2, 3, 4, 5}
    with pytest.raises(PlanError, match="the start 'deepest' drops layer 5, which is protected"):
        planned(
            "repaired",
            make_model(num_hidden_layers=7),
            1,
            polish=1,
            start={"prune": "deepest"},
            protect_last=2,
        )


def test_a_start_that_joins_layers_is_refused() -> None:
    """By its plan, where it was not known before."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.zero_()
        model.model.layers[3].self_attn.o_proj.weight.zero_()
    with pytest.raises(PlanError, match="the plan of 'sublayer' does more than drop whole layers"):
        start = {"prune": "sublayer", "criterion": "logit_kl"}
        planned("repaired", model, 1, polish=1, start=start)


def test_a_start_takes_the_target_and_suits_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the recipe is refused, with the start's own reason."""
    options = RepairedOptions(polish=1, start={"prune": "shortened"})
    pruner = Repaired(options, Target(layers_removed=1))
    dimensions = session_of(make_model()).original
    with pytest.raises(TargetError, match="keep_list"):
        pruner.check_target(dimensions, dimensions)
    kind = pruners.get("shortened")
    monkeypatch.setattr(kind, "unsuited", lambda *given: "it is short")
    family = family_of("LlamaForCausalLM")
    assert pruner.unsuited_options(family, {}) == "its start 'shortened': it is short"
    monkeypatch.setattr(kind, "targets", ("ratio",))
    with pytest.raises(
        TargetError, match=r"takes no target of kind 'layers_removed' \(it takes: ratio"
    ):
        Repaired(options, Target(layers_removed=1)).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": {"prune": "deepest"}}, "set `polish` to a number of exchanges"),
        ({"polish": 2, "merge_rules": ("mean",)}, "leave out `merge_rules`"),
        ({"polish": 2, "judge": "state"}, "start: {prune: repaired, judge: state}"),
        ({"polish": 2, "start": {"score": "taylor"}}, "give the strategy"),
        ({"polish": 2, "start": {"prune": "slm"}}, "'slm' does more than drop whole layers"),
        ({"polish": 2, "start": {"prune": "width"}}, "'width' does more than drop whole layers"),
        ({"polish": 2, "start": {"prune": "deepst"}}, "did you mean 'deepest'"),
        ({"polish": 2, "start": {"prune": "shortened", "scores": 1}}, "did you mean 'score'?"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict[str, Any], message: str) -> None:
    """With what to write instead."""
    with pytest.raises(ValidationError) as refused:
        RepairedOptions(**options)
    assert message in str(refused.value)
