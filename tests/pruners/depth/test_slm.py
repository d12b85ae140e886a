"""Sliding Layer Merging against the transcription of the released loop, and its properties."""

from __future__ import annotations

import pytest
import torch
from transformers import PreTrainedModel

from slm_plugin.errors import NumericalError, PlanError, TargetError
from slm_plugin.plans import MergeLayers, PruningPlan
from slm_plugin.pruners.depth.search.runs import Run
from slm_plugin.pruners.depth.search.trials import Trials
from slm_plugin.pruners.depth.slm import SlidingLayerMerging, SlmOptions
from slm_plugin.session import Session, apply
from slm_plugin.target import Target
from tests.oracles.slm_released import final_hidden, merge, released_loop
from tests.tiny import make_model, random_tokens


def session_of(model: PreTrainedModel, **changes: int) -> Session:
    """A session on random tokens."""
    return Session(model, calibration=random_tokens(), **changes)  # type: ignore[arg-type]


def plan(model: PreTrainedModel, target: Target, **options: object) -> PruningPlan:
    """Plan on random tokens."""
    return SlidingLayerMerging(SlmOptions(**options), target).plan(session_of(model))  # type: ignore[arg-type]


def make_identity(model: PreTrainedModel, indices: list[int]) -> None:
    """Make layers pass their input through unchanged, bit by bit."""
    with torch.no_grad():
        for index in indices:
            layer = model.model.layers[index]
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()


@pytest.mark.parametrize("threshold", [-1.1, 0.3, 0.5, 0.8, 1.01])
def test_released_rules_repeat_the_released_loop(family: str, threshold: float) -> None:
    """Same trials in the same order, same similarities, same windows as the transcription."""
    model = make_model(family, num_hidden_layers=7)
    expected = released_loop(model, random_tokens(2, 12), threshold)
    options = SlmOptions(compatibility="released")
    session = Session(model, calibration=random_tokens(2, 12))
    found = SlidingLayerMerging(options, Target(threshold=threshold)).plan(session)
    assert [(t.first, t.last) for t in found.trials] == [t[:2] for t in expected.trials]
    for trial, (_, _, similarity) in zip(found.trials, expected.trials, strict=True):
        assert trial.similarity == pytest.approx(similarity, abs=1e-5)
    assert [(op.first, op.last) for op in found.operations] == expected.windows
    assert found.after.layers == expected.layers


@pytest.mark.parametrize("threshold", [-1.1, 0.5, 0.8])
def test_the_default_walk_is_the_released_one_with_its_last_window(threshold: float) -> None:
    """Without idle trials, and with the window that the released loop discards at the bottom."""
    model = make_model(num_hidden_layers=7)
    expected = released_loop(model, random_tokens(2, 12), threshold, flush_tail=True)
    session = Session(model, calibration=random_tokens(2, 12))
    found = SlidingLayerMerging(SlmOptions(), Target(threshold=threshold)).plan(session)
    assert [(t.first, t.last) for t in found.trials] == [
        (low, high) for low, high, _ in expected.trials if low < high
    ]
    assert [(op.first, op.last) for op in found.operations] == expected.windows


def test_a_trial_equals_a_full_forward_of_a_merged_copy(family: str) -> None:
    """The similarity from cached inputs is that of the whole merged model, commits included."""
    model = make_model(family, num_hidden_layers=8)
    tokens = random_tokens()
    merged = merge(merge(model, 5, 6), 2, 4)
    cosines = [
        torch.nn.functional.cosine_similarity(
            final_hidden(model, sample).flatten(), final_hidden(merged, sample).flatten(), dim=0
        )
        for sample in tokens
    ]
    trials = Trials(session_of(model), "flat_cosine", "telescoped", weights_only=True)
    found = trials(2, 4, (Run(5, 6, "telescoped", True),))
    assert found.value == pytest.approx(float(torch.stack(cosines).mean()), abs=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 16, 40, 10_000])
def test_batches_do_not_change_similarities(batch_tokens: int) -> None:
    """A sample's similarity does not depend on the samples that it shares a batch with."""
    model = make_model(num_hidden_layers=8)
    found = Trials(session_of(model, batch_tokens=batch_tokens), "flat_cosine", "mean")
    one = Trials(session_of(model, batch_tokens=16), "flat_cosine", "mean")
    assert found(2, 4, ()).value == pytest.approx(one(2, 4, ()).value, abs=1e-6)


def test_planted_identity_layers_merge_and_logits_stay() -> None:
    """Layers 3..6 do nothing and gains are 1: the run (3, 7) merges and logits do not change."""
    model = make_model(num_hidden_layers=10)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter.fill_(1.0)
    make_identity(model, [3, 4, 5, 6])
    tokens = random_tokens()
    before = model(tokens).logits
    session = session_of(model)
    found = SlidingLayerMerging(SlmOptions(), Target(threshold=0.9999)).plan(session)
    assert [(op.first, op.last) for op in found.operations] == [(3, 7)]
    apply(found, session)
    assert len(model.model.layers) == 6
    torch.testing.assert_close(model(tokens).logits, before, atol=1e-5, rtol=1e-5)


def test_merging_is_deletion_when_gains_are_equal() -> None:
    """With all norm gains 1, telescoped equals deleting all layers of the run but the top."""
    for gains_are_one in (True, False):
        model = make_model()
        if gains_are_one:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "layernorm" in name:
                        parameter.fill_(1.0)
        tokens = random_tokens()
        deleted = make_model()
        deleted.load_state_dict(model.state_dict())
        deleted.model.layers = torch.nn.ModuleList(
            layer for i, layer in enumerate(deleted.model.layers) if i not in (1, 2)
        )
        merged = merge(model, 1, 3)
        same = torch.allclose(merged(tokens).logits, deleted(tokens).logits, atol=1e-5)
        assert same == gains_are_one


def test_planning_leaves_the_model_as_it_is(family: str) -> None:
    """No bit, no gradient flag and no layer changes while trials run, whatever the rule."""
    model = make_model(family)
    layers = list(model.model.layers)
    before = {name: p.clone() for name, p in model.named_parameters()}
    flags = [p.requires_grad for p in model.parameters()]
    for rule in ("telescoped", "rdsc", "mean", "keep_low", "keep_high", "ema(0.5)"):
        plan(model, Target(threshold=0.2), merge_rule=rule)
    assert list(model.model.layers) == layers
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert [p.requires_grad for p in model.parameters()] == flags


@pytest.mark.parametrize("removed", [1, 2, 3, 4, 5, 6])
def test_layers_removed_is_met_exactly(family: str, removed: int) -> None:
    """The plan has precisely that many layers fewer, and says how many parameters that is."""
    model = make_model(family, num_hidden_layers=8)
    session = session_of(model)
    found = SlidingLayerMerging(SlmOptions(), Target(layers_removed=removed)).plan(session)
    assert found.layers_removed == removed
    apply(found, session)
    assert len(model.model.layers) == 8 - removed
    assert sum(p.numel() for p in model.parameters()) == found.after.parameters


def test_ratio_becomes_the_nearest_number_of_layers() -> None:
    """A ratio of 2.4 layers removes two, and the note states the share that this is."""
    model = make_model(num_hidden_layers=8)
    dims = session_of(model).original
    share = dims.layer_parameters / dims.parameters
    found = plan(model, Target(ratio=2.4 * share))
    assert found.layers_removed == 2
    assert f"{2 * share:.2%}" in found.notes[0]


def test_a_plan_lists_each_trial_once() -> None:
    """Trials of the decision and those of other thresholds are disjoint and all there."""
    found = plan(make_model(num_hidden_layers=8), Target(layers_removed=2))
    windows = [(t.first, t.last, t.committed) for t in (*found.trials, *found.explored)]
    assert len(windows) == len(set(windows))


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        (Target(layers_removed=8), {}, "the model has 8"),
        (Target(layers_removed=7), {}, "at most 6 of 8"),
        (Target(layers_removed=4), {"protect_first": 3}, "at most 3 of 8"),
        (Target(ratio=0.001), {}, "less than half a layer"),
        (Target(parameters=10**9), {}, "less than half a layer"),
    ],
)
def test_impossible_targets_say_what_is_possible(
    target: Target, options: dict[str, object], words: str
) -> None:
    """Too much, too little, or more than protection allows: one sentence with the limit."""
    with pytest.raises(TargetError, match=words):
        plan(make_model(num_hidden_layers=8), target, **options)


def test_nan_is_an_error() -> None:
    """A model that is broken already is refused before the first trial."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(NumericalError, match="NaN"):
        plan(model, Target(threshold=0.5))


@pytest.mark.parametrize("search", ["sliding", "greedy", "budgeted"])
def test_layers_of_different_kinds_never_merge(search: str) -> None:
    """Sliding-window and full-attention layers merge among themselves, and no further."""
    kinds = ["full_attention"] * 3 + ["sliding_attention"] * 3
    model = make_model("qwen2", use_sliding_window=True, sliding_window=8, layer_types=kinds)
    made = plan(model, Target(layers_removed=4), search=search, protect_last=0)
    assert made.layers_removed == 4
    for operation in made.operations:
        assert isinstance(operation, MergeLayers)
        assert (operation.first < 3) == (operation.last < 3)
    with pytest.raises(TargetError, match="different kinds, which never merge, at most 4 of 6"):
        plan(model, Target(layers_removed=5), search=search, protect_last=0)


def test_the_same_search_gives_the_same_bytes() -> None:
    """Two plans of the same model, tokens and options are equal as files."""
    target = Target(layers_removed=2)
    assert plan(make_model(), target).to_json() == plan(make_model(), target).to_json()


@pytest.mark.parametrize("criterion", ["token_cosine", "cka_unbiased", "logit_kl", "loss"])
@pytest.mark.parametrize("search", ["sliding", "greedy", "budgeted"])
def test_every_search_meets_its_size_by_every_criterion(criterion: str, search: str) -> None:
    """The plan applies, takes exactly that many layers and says why these."""
    model = make_model(num_hidden_layers=7)
    session = session_of(model)
    options = SlmOptions(criterion=criterion, search=search)
    found = SlidingLayerMerging(options, Target(layers_removed=3)).plan(session)
    assert found.layers_removed == 3
    assert len(found.notes) == 3
    apply(found, session)
    assert len(model.model.layers) == 4


@pytest.mark.parametrize("search", ["greedy", "budgeted"])
def test_planted_redundancy_is_found_by_every_search(search: str) -> None:
    """Four layers that do nothing go first, and nothing is lost."""
    model = make_model(num_hidden_layers=10)
    make_identity(model, [2, 3, 6, 7])
    tokens = random_tokens()
    before = model(tokens).logits
    session = session_of(model)
    options = SlmOptions(criterion="logit_kl", search=search, merge_rule="keep_high")
    found = SlidingLayerMerging(options, Target(layers_removed=4)).plan(session)
    apply(found, session)
    torch.testing.assert_close(model(tokens).logits, before, atol=1e-4, rtol=1e-4)


def test_greedy_obeys_a_threshold() -> None:
    """Merging goes on exactly as long as the best merge is above the threshold."""
    options = {"criterion": "flat_cosine", "search": "greedy"}
    whole = plan(make_model(num_hidden_layers=8), Target(layers_removed=5), **options)
    values = [trial.similarity for trial in whole.trials]
    assert values == sorted(values, reverse=True)
    cut = plan(make_model(num_hidden_layers=8), Target(threshold=values[3]), **options)
    assert cut.trials == whole.trials[:3]
    assert cut.layers_removed == 3


def test_early_rejection_changes_no_decision() -> None:
    """Windows are those of whole trials, and some trials have seen fewer samples."""
    stopped = 0
    for threshold in (0.3, 0.5, 0.7, 0.9):
        plans = [
            SlidingLayerMerging(SlmOptions(), Target(threshold=threshold)).plan(
                session_of(make_model(num_hidden_layers=8), batch_tokens=batch_tokens)
            )
            # A trial of one batch cannot stop early.
            for batch_tokens in (16, 10_000)
        ]
        assert plans[0].operations == plans[1].operations
        assert [t.accepted for t in plans[0].trials] == [t.accepted for t in plans[1].trials]
        assert all(t.samples is None for t in plans[1].trials)
        stopped += sum(t.samples is not None for t in plans[0].trials)
    assert stopped > 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"compatibility": "released", "protect_last": 2}, "released means protect_last: 1"),
        ({"compatibility": "released", "criterion": "loss"}, "criterion: flat_cosine"),
        ({"beam_width": 4}, "needs search: greedy"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    options: dict[str, object], words: str
) -> None:
    """No option does nothing silently."""
    with pytest.raises(ValueError, match=words):
        SlmOptions(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "options", "words"),
    [
        (Target(layers_removed=2), {"compatibility": "released"}, "supports only a threshold"),
        (Target(threshold=0.9), {"search": "budgeted"}, "needs a size"),
    ],
)
def test_a_search_says_which_targets_it_knows(
    target: Target, options: dict[str, object], words: str
) -> None:
    """The released code has no size, dynamic programming no threshold."""
    with pytest.raises(TargetError, match=words):
        plan(make_model(), target, **options)


def test_a_plan_can_be_cut_to_its_first_windows() -> None:
    """Cut plans nest, apply without a search, and give the stated sizes."""
    model = make_model(num_hidden_layers=9)
    make_identity(model, [1, 2, 4, 6, 7])
    whole = plan(model, Target(layers_removed=4), search="budgeted", criterion="token_cosine")
    count = len(whole.operations)
    assert count > 1
    assert whole.upto(count).operations == whole.operations
    for kept in range(1, count):
        fresh = make_model(num_hidden_layers=9)
        make_identity(fresh, [1, 2, 4, 6, 7])
        cut = whole.upto(kept)
        apply(cut, session_of(fresh))
        removed = sum(op.last - op.first for op in whole.operations[:kept])
        assert len(fresh.model.layers) == 9 - removed == cut.after.layers
    with pytest.raises(PlanError, match=f"has {count} operations, not {count + 1}"):
        whole.upto(count + 1)
