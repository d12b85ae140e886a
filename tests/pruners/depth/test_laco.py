"""LaCo against the published loop over whole deep copies, and what its windows may reach."""

from __future__ import annotations

import copy
import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from slm_plugin.errors import NumericalError, TargetError
from slm_plugin.plans import MergeLayers, PruningPlan
from slm_plugin.pruners.depth.laco import CollapseRules, absorbing, collapse
from slm_plugin.pruners.depth.search.runs import Measured, Run, Runs
from slm_plugin.session import apply
from slm_plugin.target import Target
from tests.pruners.depth.strategies import TOKENS, make_identity, planned, session_of
from tests.tiny import make_model


@dataclass
class Loop:
    """What the published loop did: bases, absorbed layers and similarity of every trial."""

    trials: list[tuple[int, int, float, bool]] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    model: nn.Module | None = None


@torch.no_grad()
def collapsed(model: nn.Module, base: int, absorbed: int, rule: str) -> nn.Module:
    """A copy whose layer takes up the layers above it, a parameter after the other."""
    model = copy.deepcopy(model)
    layers = model.model.layers
    originals = copy.deepcopy(layers)
    for name, current in layers[base].named_parameters():
        if not name.startswith(("self_attn.", "mlp.")):
            continue
        for index in range(base + 1, base + absorbed + 1):
            from_ = originals[base].get_parameter(name) if rule == "rdsc" else current.clone()
            current += originals[index].get_parameter(name) - from_
    del layers[base + 1 : base + absorbed + 1]
    return model


@torch.no_grad()
def similarity(first: nn.Module, second: nn.Module) -> float:
    """Mean over samples of the cosine of flattened final hidden states, a sample at a time."""
    values = [
        nn.functional.cosine_similarity(
            *(model.model(sample[None]).last_hidden_state.flatten() for model in (first, second)),
            dim=0,
        )
        for sample in TOKENS
    ]
    return float(torch.stack(values).double().mean())


def published(
    model: nn.Module, c: int, i: int, low: int, high: int, threshold: float, rule: str
) -> Loop:
    """The loop of the paper, a deep copy and a full forward a trial."""
    made, current, at = Loop(), model, high - c
    while at >= low:
        absorbed = min(c - 1, len(current.model.layers) - at - 1)
        tried = collapsed(current, at, absorbed, rule)
        value = similarity(model, tried)
        made.trials.append((at, absorbed, value, value > threshold))
        if value > threshold:
            current = tried
            at -= i
            left = len(current.model.layers)
            if at > left - c:
                at = left - c
            made.sizes.append(left)
        else:
            at -= 1
    made.model = current
    return made


def median_threshold(model: PreTrainedModel, **options: object) -> float:
    """A threshold that some trials pass and others do not."""
    trials = planned("laco", model, Target(threshold=-2.0), **options).trials
    values = sorted(trial.similarity for trial in trials)
    return (values[len(values) // 2 - 1] + values[len(values) // 2]) / 2


def similar_model(family: str = "llama", layers: int = 10) -> PreTrainedModel:
    """Layers that change little, so that some merges are good."""
    model = make_model(family, num_hidden_layers=layers)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            layer.mlp.down_proj.weight.mul_(0.2 + 0.05 * index)
            layer.self_attn.o_proj.weight.mul_(0.4)
    return model


# All settings on the family with biases; the walk does not depend on the family.
LOOPS = [*itertools.product(["qwen2"], ["telescoped", "rdsc"], [3, 4]), ("llama", "rdsc", 3)]


@pytest.mark.parametrize(("family", "rule", "c"), LOOPS)
def test_it_is_the_published_loop(family: str, rule: str, c: int) -> None:
    """Same trials, similarities and decisions, and the plan's model is the loop's."""
    i = c - 2
    options = {"layers_per_merge": c, "interval": i, "merge_rule": rule}
    model = similar_model(family, 8)
    for threshold in (-2.0, median_threshold(model, **options)):
        loop = published(model, c, i, 1, 7, threshold, rule)
        session = session_of(copy.deepcopy(model))
        plan = planned("laco", session.model, Target(threshold=threshold), **options)
        found = [(trial.similarity, trial.accepted) for trial in plan.trials]
        assert [good for _, good in found] == [good for *_, good in loop.trials]
        for (value, good), (*_, expected, _) in zip(found, loop.trials, strict=True):
            assert not good or value == pytest.approx(expected, abs=1e-5)
        apply(plan, session)
        assert loop.model is not None
        assert len(session.model.model.layers) == len(loop.model.model.layers)
        assert similarity(loop.model, session.model) == pytest.approx(1, abs=1e-6)


def test_two_layers_make_the_same_by_both_rules() -> None:
    """With C = 2 and no overlap RDSC is the telescoped sum: the top layer."""
    options = {"layers_per_merge": 2, "interval": 2}
    found = []
    for rule in ("telescoped", "rdsc"):
        session = session_of(make_model(num_hidden_layers=8))
        plan = planned("laco", session.model, 3, merge_rule=rule, **options)
        assert {op.rule for op in merges(plan)} == {rule}
        apply(plan, session)
        found.append(session.model(TOKENS).logits)
    torch.testing.assert_close(found[0], found[1], atol=1e-4, rtol=1e-4)


def merges(plan: PruningPlan) -> list[MergeLayers]:
    """The merges of a plan."""
    assert all(isinstance(op, MergeLayers) for op in plan.operations)
    return [op for op in plan.operations if isinstance(op, MergeLayers)]


def test_a_window_over_merged_layers_is_one_merge_of_original_ones() -> None:
    """RDSC of an RDSC is written out in weights of the original layers, which add up to 1."""
    window = [Run(2, 2, "rdsc"), Run(3, 5, "rdsc"), Run(6, 6, "rdsc")]
    assert absorbing("rdsc", window) == "weighted(-1,-1,1,1,1)"
    on_top = [Run(0, 0, "rdsc"), Run(1, 1, "rdsc"), Run(2, 6, "weighted(-1,-1,1,1,1)")]
    assert absorbing("rdsc", on_top) == "weighted(-1,1,-1,-1,1,1,1)"
    assert absorbing("rdsc", [Run(0, 0, "rdsc"), Run(1, 3, "rdsc")]) == "weighted(0,-1,1,1)"
    assert absorbing("rdsc", window[:1] + window[2:]) == "rdsc"
    assert absorbing("telescoped", [Run(2, 2, "telescoped"), Run(3, 5, "telescoped")]) == (
        "telescoped"
    )
    plan = planned(
        "laco",
        make_model(num_hidden_layers=10),
        Target(threshold=-2.0),
        merge_rule="rdsc",
        layers_per_merge=3,
        interval=1,
    )
    weighted = [op.rule for op in merges(plan) if op.rule.startswith("weighted")]
    assert weighted
    for rule in weighted:
        assert sum(int(part) for part in rule[9:-1].split(",")) == 1
    taken = [index for op in merges(plan) for index in range(op.first, op.last + 1)]
    assert len(taken) == len(set(taken))


def always(value: float) -> object:
    """A measure that likes everything alike."""

    def measure(first: int, last: int, rest: Runs, *, rule: str, **asked: object) -> Measured:
        return Measured(Run(first, last, rule), value)

    return measure


def rules(layers: int, size: int, interval: int, **more: int) -> object:
    """Rules of a walk from layer 1 to the last but one, or as given."""
    given = {"lowest": 1, "highest": layers - 1, **more}
    return CollapseRules(layers, size, interval, rule="telescoped", **given)  # type: ignore[arg-type]


CASES = [
    (layers, size, interval)
    for layers, size, interval in itertools.product([6, 9, 14, 32], [2, 3, 4, 6], [1, 2, 3, 5])
    # A window fits.
    if layers - 1 - size >= 1
]


@pytest.mark.parametrize(("layers", "size", "interval"), CASES)
def test_every_accepted_full_window_removes_one_less_than_its_layers(
    layers: int, size: int, interval: int
) -> None:
    """The walk keeps every window full and inside the model."""
    found = collapse(rules(layers, size, interval), -1.0, always(0.0))  # type: ignore[arg-type]
    assert found.removed == len(found.trials) * (size - 1)
    for trial in found.trials:
        assert 1 <= trial.first < trial.last < layers
        assert all(first > trial.last for first, _ in trial.committed)


def test_a_later_window_may_take_the_last_layer() -> None:
    """Llama-2-7B with C 4 and I 2: after the first merge the next window ends at layer 31."""
    found = collapse(rules(32, 4, 2), -1.0, always(0.0))  # type: ignore[arg-type]
    assert (found.trials[0].first, found.trials[0].last) == (27, 30)
    assert (found.trials[1].first, found.trials[1].last) == (25, 31)


@pytest.mark.parametrize("rule", ["telescoped", "rdsc"])
def test_a_threshold_that_nothing_passes_changes_nothing(rule: str) -> None:
    """H - C - L + 1 trials and no operation."""
    plan = planned("laco", make_model(num_hidden_layers=9), Target(threshold=1.01), merge_rule=rule)
    assert plan.operations == () and len(plan.trials) == 8 - 4 - 1 + 1
    assert plan.after == plan.before
    assert plan.notes == ("no layers are merged",)


def test_planted_identity_layers_collapse() -> None:
    """A group of identity layers under one top identity merges with similarity 1."""
    model = make_model(num_hidden_layers=10)
    make_identity(model, [4, 5, 6, 7])
    with torch.no_grad():
        before = model(TOKENS).logits
    session = session_of(model)
    plan = planned("laco", model, Target(threshold=0.999999))
    assert [(op.first, op.last) for op in merges(plan)] == [(4, 7)]
    assert max(trial.similarity for trial in plan.trials) == pytest.approx(1, abs=1e-12)
    apply(plan, session)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize("rule", ["telescoped", "rdsc"])
def test_every_size_that_the_walk_can_reach_is_met(rule: str) -> None:
    """From one layer to the most; one more is refused with the limit."""
    options = {"layers_per_merge": 3, "interval": 1, "merge_rule": rule}
    model = make_model(num_hidden_layers=7)
    open_ = planned("laco", model, Target(threshold=-2.0), **options)
    most = open_.layers_removed
    for wanted in range(1, most + 1):
        plan = planned("laco", model, wanted, **options)
        assert plan.layers_removed == wanted
        last = [trial for trial in plan.trials if trial.accepted][-1]
        assert plan.threshold is not None and last.similarity > plan.threshold
    with pytest.raises(TargetError, match=rf"at most {most} of 7 can be removed"):
        planned("laco", model, most + 1, **options)


def test_the_threshold_that_a_size_finds_is_the_highest() -> None:
    """Brute force over all thresholds that matter finds no higher walk to that size."""
    model = similar_model(layers=9)
    options = {"layers_per_merge": 3, "interval": 2}
    for wanted in (2, 4):
        plan = planned("laco", model, wanted, **options)
        assert plan.threshold is not None
        values = {t.similarity for t in (*plan.trials, *plan.explored)}
        higher = [
            planned("laco", model, Target(threshold=value), **options).layers_removed
            for value in sorted(values)
            if value > plan.threshold
        ]
        assert all(count < wanted for count in higher)
        again = planned("laco", model, Target(threshold=plan.threshold), **options)
        assert again.operations[: len(plan.operations)] == plan.operations


def test_planning_and_the_file_leave_everything_as_it_is(tmp_path: pytest.TempPathFactory) -> None:
    """The model keeps its bits, and the plan with its negative weights survives its file."""
    session = session_of(make_model(num_hidden_layers=9))
    before = session.fingerprint()
    plan = planned("laco", session.model, 5, merge_rule="rdsc", layers_per_merge=3)
    session.model_changed()
    assert session.fingerprint() == before
    file = tmp_path / "plan.json"  # type: ignore[operator]
    plan.write(file)
    assert PruningPlan.read(file) == plan
    session = session_of(session.model)
    apply(PruningPlan.read(file), session)
    assert len(session.model.model.layers) == 4


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layers_per_merge": 6}, "no window fits into the model's 6 layers"),
        ({"highest": 7}, "highest is 7; the model has 6 layers"),
        ({"highest": 3}, "no window fits"),
    ],
)
def test_a_range_without_room_is_refused(options: dict[str, int], words: str) -> None:
    """One message each, before any trial."""
    with pytest.raises(TargetError, match=words):
        planned("laco", make_model(), Target(threshold=0.5), **options)


def test_nan_is_refused_and_layers_of_different_kinds_never_merge() -> None:
    """NaN never counts as too different, and sliding layers never absorb full ones."""
    model = make_model(num_hidden_layers=8)
    with torch.no_grad():
        model.model.layers[3].mlp.down_proj.weight.fill_(math.nan)
    with pytest.raises(NumericalError):
        planned("laco", model, Target(threshold=0.5))
    kinds = ["full_attention"] * 4 + ["sliding_attention"] * 4
    window = {"use_sliding_window": True, "sliding_window": 4}
    mixed = make_model("qwen2", num_hidden_layers=8, layer_types=kinds, **window)
    made = planned("laco", mixed, Target(threshold=-1), layers_per_merge=2, lowest=0)
    assert made.layers_removed
    assert all((merge.first < 4) == (merge.last < 4) for merge in made.operations)
