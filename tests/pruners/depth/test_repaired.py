"""The search that repairs: against SLEB, whole repaired models, and planted layers."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from slm_plugin.calibration.captures import run_layers
from slm_plugin.errors import CalibrationError
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import DropLayers, DropSublayers, MergeLayers
from slm_plugin.pruners.depth.repaired import Offer, Repaired, candidates
from slm_plugin.pruners.depth.repaired_options import RepairedOptions
from slm_plugin.pruners.depth.search.judged_samples import judged_parts
from slm_plugin.pruners.depth.search.race import FEWEST, is_worse, race
from slm_plugin.pruners.depth.search.repaired_stack import Candidate
from slm_plugin.pruners.depth.search.repaired_trials import RepairedTrials
from slm_plugin.pruners.depth.search.runs import DROP, JOIN, Run
from slm_plugin.session import Session
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
from tests.recovery.pruned import TOKENS, UNFITTED, pruned, recover, remove
from tests.tiny import make_model

MEAN = Candidate(Run(2, 3, "mean"), 2)
JOINED = Candidate(Run(2, 3, JOIN), 2)
LOWEST = Candidate(Run(0, 0, DROP), 0, replaced=1)


def dropped(layer: int, at: int | None = None) -> Candidate:
    """The candidate that drops a layer, by default in a stack where none is missing below."""
    return Candidate(Run(layer, layer, DROP), layer - 1 if at is None else at)


def repaired_model(repair: str, *done: Candidate, family: str = "llama") -> PreTrainedModel:
    """What surgery and the recovery of the boundaries make of a model."""
    operations = [candidate.run.operation for candidate in done]
    session = pruned(make_model(family), *operations)  # type: ignore[arg-type]
    name, options = RECOVERY[repair]
    recover(name, session, **options)
    return session.model


@pytest.mark.parametrize("wanted", [2, 4])
def test_without_repair_and_screening_it_is_sleb(family: str, wanted: int) -> None:
    """The same layers in the same order, with the same losses."""
    model = make_model(family)
    sleb = planned("sleb", model, wanted)
    ends = {"protect_first": 1, "protect_last": 1}
    options = {"repair": "none", "judge": "loss", "screen": "all", **ends}
    plan = planned("repaired", model, wanted, **options)
    assert plan.operations == sleb.operations
    assert [t.similarity for t in plan.trials] == [t.similarity for t in sleb.trials]


@pytest.mark.parametrize(
    ("repair", "candidate"),
    [*itertools.product(RECOVERY, (dropped(3), dropped(5), MEAN, JOINED)), ("rescale", LOWEST)],
)
def test_a_trial_is_the_loss_of_the_repaired_model(repair: str, candidate: Candidate) -> None:
    """As surgery and the recovery make it, for drops, merges and joins; on unfitted samples."""
    model = make_model()
    trials = RepairedTrials(session_of(model, calibration=TOKENS), repair, "loss")
    judged = trials.best([candidate], whole=True)
    tokens = judged_on(repair)
    after = mean_loss(repaired_model(repair, candidate), tokens)
    assert -judged.value == pytest.approx(after - mean_loss(model, tokens), abs=2e-5)


@pytest.mark.parametrize("repair", FITS)
def test_committed_layers_are_those_of_the_recovery(repair: str) -> None:
    """Gaps above a later one are repaired anew, from the weights of before."""
    done = [dropped(4), dropped(2), LOWEST]
    trials = RepairedTrials(session_of(make_model(), calibration=TOKENS), repair, "loss")
    for candidate in done:
        trials.commit(trials.best([candidate], whole=True))
    expected = repaired_model(repair, *done)
    for mine, theirs in zip(trials.stack.layers, DecoderView.of(expected).layers, strict=True):
        for (name, one), other in zip(mine.named_parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4, msg=name)


def test_committed_factors_are_those_of_the_recovery() -> None:
    """The factor of an upper gap is measured anew, on states that a lower one has scaled.

    Where the lowest layer goes, the lower gap is behind the embedding.
    """
    session = session_of(make_model(), calibration=TOKENS)
    trials, done = RepairedTrials(session, "rescale", "loss"), (dropped(4), dropped(2), LOWEST)
    parts = judged_parts(session, fitted=False)
    for candidate in done:
        trials.commit(trials.best([candidate], whole=True))
    states = torch.cat([trials.stack.outputs(part) for part in parts])
    expected = repaired_model("rescale", *done)(TOKENS).logits
    torch.testing.assert_close(session.view.logits(states), expected, atol=5e-4, rtol=0)


@torch.no_grad()
def test_a_gap_lacks_what_is_left_behind_its_factor() -> None:
    """The relative error of all samples."""
    session = session_of(make_model(), calibration=TOKENS)
    for candidate in (dropped(2), dropped(4), MEAN):
        with_factor = RepairedTrials(session, "rescale", None).lack(candidate)
        stack = RepairedTrials(session, "rescale", None).stack
        layer = stack.repaired(candidate)
        assert layer is not None
        here, wanted = [], []
        for batch in session.captured():
            first = stack.spans[candidate.at][0]
            arguments = batch.arguments[first]
            here.append(run_layers([layer], batch.inputs[candidate.at], arguments).double())
            wanted.append(batch.inputs[candidate.at + candidate.replaced].double())
        state, target = torch.cat(here), torch.cat(wanted)
        assert with_factor == pytest.approx(float((state - target).norm() / target.norm()))


def test_after_an_earlier_stage_the_target_is_the_dense_model() -> None:
    """Here too a trial is the loss of the model with the boundaries repaired."""
    session = pruned(make_model(), DropLayers(indices=(4,)))
    before = mean_loss(session.model, UNFITTED)
    # Behind the gap of layer 4 the dense model's state differs from the present model's.
    value = RepairedTrials(session, "boundary", "loss").best([dropped(3)], whole=True).value
    remove(session, DropLayers(indices=(3,)))
    recover("refit", session, layers="boundaries")
    assert -value == pytest.approx(mean_loss(session.model, UNFITTED) - before, abs=2e-5)


def test_lacks_that_are_kept_are_those_of_a_new_search() -> None:
    """After every step, for every candidate, as if none had been computed before."""
    session = session_of(make_model(num_hidden_layers=7), calibration=TOKENS[:10])
    trials = RepairedTrials(session, "fold_linear", "loss")
    offer = Offer(range(7), (), lambda first: [JOIN])
    done: list[Candidate] = []
    for wanted in (4, 3, 2):
        fresh = RepairedTrials(session, "fold_linear", "loss")
        for candidate in done:
            fresh.commit(fresh.best([candidate], whole=True))
        given = list(candidates(trials.stack.spans, offer, wanted))
        lacks = [trials.lack(candidate) for candidate in given]
        assert lacks == pytest.approx([fresh.lack(one) for one in given], rel=1e-9)
        # In the middle, so that there are kept ones on one side and new ones on the other.
        rule = JOIN if wanted == 3 else DROP
        fitting = [candidate for candidate in given if candidate.run.rule == rule]
        done.append(fitting[len(fitting) // 2])
        trials.commit(trials.best([done[-1]], whole=True))


@pytest.mark.parametrize("repair", [*RECOVERY, "none"])
def test_what_the_lowest_layer_leaves_is_compared_on_the_same_samples(repair: str) -> None:
    """Nothing can be fitted below it, but all other candidates count the unfitted samples."""
    model = make_model()
    trials = RepairedTrials(session_of(model, calibration=TOKENS, batch_tokens=48), repair, None)
    counted = judged_on(repair)
    with torch.no_grad():
        before, behind = model(counted, output_hidden_states=True).hidden_states[:2]
    if repair == "rescale":
        before *= (behind.norm(dim=-1) / before.norm(dim=-1)).mean()
    expected = float((behind - before).norm() / behind.norm())
    assert trials.lack(LOWEST) == pytest.approx(expected, rel=1e-5)


def make_linear(model: PreTrainedModel, layer: int) -> None:
    """Let a layer do nothing but apply a linear map to what the MLP below has added."""
    below, above = model.model.layers[layer - 1], model.model.layers[layer]
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        # So little that the stream, which both MLPs read, is the same.
        below.mlp.down_proj.weight.mul_(1e-4)
        above.self_attn.o_proj.weight.zero_()
        above.mlp.load_state_dict(copy.deepcopy(below.mlp.state_dict()))
        above.post_attention_layernorm.load_state_dict(below.post_attention_layernorm.state_dict())
        size = len(below.mlp.down_proj.weight)
        mixed = torch.randn(size, size, generator=generator) @ below.mlp.down_proj.weight
        above.mlp.down_proj.weight.copy_(3e4 * mixed)


@pytest.mark.parametrize("repair", FITS)
@pytest.mark.parametrize("judge", ["kl", "state"])
def test_a_layer_that_a_repair_replaces_goes_first(repair: str, judge: str) -> None:
    """Although without the repair it is the layer whose removal changes the model most."""
    model = make_model()
    make_linear(model, 3)
    options = {"repair": repair, "judge": judge, "screen": 2}
    tokens = TOKENS.repeat(2, 1)[:, torch.randperm(16, generator=torch.Generator().manual_seed(1))]
    plan = planned("repaired", model, 1, tokens=tokens, **options)
    assert removed(plan) == [3]
    plain = RepairedTrials(session_of(model, calibration=tokens), "none", "logit_kl")
    values = {i: plain.best([dropped(i)], whole=True).value for i in range(1, 6)}
    assert min(values, key=values.__getitem__) == 3


def test_a_join_without_loss_goes_first() -> None:
    """An MLP and the next attention that add nothing leave one layer of the two."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.zero_()
        model.model.layers[3].self_attn.o_proj.weight.zero_()
    rules = ["mean", "join"]
    plan = planned("repaired", model, 1, repair="none", judge="kl", merge_rules=rules)
    assert plan.operations == (DropSublayers(attention=(3,), mlp=(2,)),)
    assert plan.trials[0].similarity == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("repair", "recovery"),
    [
        ("boundary", {"recover": "refit"}),
        ("fold_linear", {"recover": "fold_linear"}),
        ("rescale", {"recover": "rescale"}),
        ("none", None),
    ],
)
def test_a_plan_names_the_recovery_that_follows(
    repair: str, recovery: dict[str, str] | None
) -> None:
    """So that its loss before it is not warned of, and `apply` tells what it leaves out."""
    assert planned("repaired", make_model("llama"), 2, repair=repair).followed_by == recovery


def test_a_plan_begins_with_every_smaller_one() -> None:
    """Also where merges and drops follow one another."""
    model = make_model(num_hidden_layers=7)
    options = {"merge_rules": ["telescoped", "join"], "screen": 6}
    plans = [planned("repaired", model, wanted, **options) for wanted in (2, 3, 4)]
    kinds = {type(operation) for operation in plans[-1].operations}
    assert kinds & {MergeLayers, DropSublayers}
    for less, more in itertools.pairwise(plans):
        assert more.operations[: len(less.operations)] == less.operations


def test_layers_that_merged_take_part_in_nothing_more() -> None:
    """And a merge is left out where too few layers would be left for the target."""
    offer = Offer(range(1, 5), (), lambda first: ["mean"])
    spans = [(0, 0), (1, 2), (3, 3), (4, 4), (5, 5)]
    assert list(candidates(spans, offer, 1)) == [
        dropped(3, 1),
        Candidate(Run(3, 4, "mean"), 2),
        dropped(4, 2),
    ]
    assert list(candidates(spans, offer, 2)) == [dropped(3, 1), dropped(4, 2)]
    assert list(candidates([(0, 0), (2, 2)], Offer((0, 2), (), lambda first: ["mean"]), 1)) == [
        LOWEST,
        dropped(2, 0),
    ]
    unlike = Offer(range(4), ("full", "sliding"), lambda first: ["mean", JOIN])
    assert Candidate(Run(0, 1, JOIN), 0) in candidates([(0, 0), (1, 1)], unlike, 1)
    assert Candidate(Run(0, 1, "mean"), 0) not in candidates([(0, 0), (1, 1)], unlike, 1)


def test_a_race_stops_what_is_clearly_worse_and_nothing_else() -> None:
    """By paired differences; all samples count when the whole is asked for."""
    noise = torch.randn(3, 40, generator=torch.Generator().manual_seed(0)).tolist()
    shared = torch.randn(40, generator=torch.Generator().manual_seed(1)).mul(9).tolist()
    # Alike but for noise, and 1 below: the noise that both share does not count.
    gaps, sizes = (0.0, 0.0, 1.0), (0.1, 0.1, 0.1)

    def values(candidate: int, part: int) -> list[float]:
        return [
            shared[n] + sizes[candidate] * noise[candidate][n] - gaps[candidate]
            for n in range(2 * part, 2 * part + 2)
        ]

    lengths = [len(seen) for seen in race(3, 20, values, whole=False)]
    assert lengths == [40, 40, FEWEST]
    assert [len(seen) for seen in race(3, 20, values, whole=True)] == [40, 40, 40]
    assert not is_worse([0.0] * (FEWEST - 1), [1.0] * (FEWEST - 1))
    assert not is_worse([1.0] * 20, [1.0] * 20) and not is_worse([1.0] * 20, [0.0] * 20)


def test_a_killed_search_goes_on(tmp_path: Path) -> None:
    """Every beginning of the journals ends in the same plan, and the same files."""

    def plan() -> str:
        session = session_of(make_model(), calibration=TOKENS, journals=tmp_path)
        options = RepairedOptions(merge_rules=("mean",), screen=3)
        return Repaired(options, Target(layers_removed=3)).plan(session).to_json()

    expected = plan()
    files = {file: file.read_text() for file in tmp_path.glob("*.jsonl")}
    assert len(files) == 2
    assert plan() == expected and files == {file: file.read_text() for file in files}
    for share in (0.3, 0.7):
        for file, whole in files.items():
            lines = whole.splitlines(keepends=True)
            file.write_text("".join(lines[: int(share * len(lines))]))
        assert plan() == expected
        assert files == {file: file.read_text() for file in files}


def test_one_sample_is_no_data_for_a_repair() -> None:
    """One is held out, so that nothing is left to fit."""
    with pytest.raises(CalibrationError, match="fewer than 2 calibration samples"):
        planned("repaired", make_model(), 1, tokens=TOKENS[:1])
    assert planned("repaired", make_model(), 1, tokens=TOKENS[:1], repair="none")


def test_a_session_serves_it_as_before() -> None:
    """Nothing of the model changes, and its plan can be carried out and repaired."""
    model = make_model()
    session = Session(model, calibration=TOKENS)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    plan = session.plan(Repaired(RepairedOptions(), Target(layers_removed=2)))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert plan.layers_removed == 2 and len(plan.trials) == 2
    assert all(trial.committed == () for trial in plan.explored[:4])
