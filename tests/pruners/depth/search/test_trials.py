"""Trials against the whole merged model, whatever they start from and whoever stops them."""

from __future__ import annotations

import functools
import gc
import itertools
import math
import weakref
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from slm_plugin.cache import Store
from slm_plugin.errors import NumericalError
from slm_plugin.models.head import Head
from slm_plugin.plans import MergeLayers
from slm_plugin.pruners.depth.measures.criteria import CRITERIA
from slm_plugin.pruners.depth.search.journal import Journal
from slm_plugin.pruners.depth.search.runs import DROP, Run, Runs
from slm_plugin.pruners.depth.search.trials import Trials
from slm_plugin.pruners.depth.slm import SlidingLayerMerging, SlmOptions
from slm_plugin.pruners.influence import block_influence
from slm_plugin.registry import pruners
from slm_plugin.session import Session
from slm_plugin.surgery.layers import apply_layers
from slm_plugin.target import Target
from tests.tiny import make_model, random_tokens

TOKENS = random_tokens(6, 10)


def session_of(model: PreTrainedModel, **changes: int) -> Session:
    """A session on six samples, two a batch."""
    return Session(model, calibration=TOKENS, **{"batch_tokens": 20, **changes})  # type: ignore[arg-type]


@functools.cache
def whole(runs: Runs) -> tuple[torch.Tensor, Head]:
    """Final state and head of a model that was merged by surgery and run as a whole."""
    merged = make_model(num_hidden_layers=8)
    apply_layers(merged, [MergeLayers(first=r.first, last=r.last, rule=r.rule) for r in runs])
    with torch.inference_mode():
        return merged.model(input_ids=TOKENS).last_hidden_state, Head(merged.lm_head)


def oracle(criterion: str, runs: Runs) -> float:
    """The criterion on a merged model."""
    (dense, head), chosen = whole(()), CRITERIA[criterion]
    with torch.inference_mode():
        prepared = chosen.prepare(dense, TOKENS, head)
        return float(chosen.compare(prepared, whole(runs)[0], head).mean())


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("base", [(), (Run(1, 2, "mean"),), (Run(1, 2, "mean"), Run(5, 6, "mean"))])
def test_a_trial_equals_the_whole_merged_model(criterion: str, base: Runs) -> None:
    """Every criterion, standing on the original or on a merged model, alone or absorbing a run."""
    trials = Trials(session_of(make_model(num_hidden_layers=8)), criterion, "mean")
    for first, last in [(5, 6), (3, 4), (1, 3), (0, 2)]:
        rest = tuple(run for run in base if run.last < first or run.first > last)
        found = trials(first, last, rest, base=base)
        runs = (*rest, Run(first, last, "mean"))
        assert found.value == pytest.approx(oracle(criterion, runs), abs=2e-5)
        assert found.samples is None


def test_nothing_of_a_former_base_is_used() -> None:
    """A trial on the original model after one on a merged model starts from the original."""
    trials = Trials(session_of(make_model(num_hidden_layers=8)), "flat_cosine", "mean")
    base = (Run(1, 2, "mean"),)
    trials(5, 6, base, base=base)
    expected = oracle("flat_cosine", (Run(3, 4, "mean"),))
    assert trials(3, 4, ()).value == pytest.approx(expected, abs=2e-5)


def test_no_trial_is_made_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of the other runs does not make it another trial."""
    counted: list[int] = []
    trials = Trials(
        session_of(make_model(num_hidden_layers=8)),
        "flat_cosine",
        "mean",
        count=lambda: counted.append(1),
    )
    low, high = Run(0, 1, "mean"), Run(5, 6, "mean")
    values = {trials(2, 3, rest).value for rest in [(low, high), (high, low)]}
    values.add(trials(5, 6, (low, Run(2, 3, "mean"))).value)
    assert len(values) == 1
    assert len(counted) == 1


@pytest.mark.parametrize("criterion", ["flat_cosine", "token_cosine", "logit_kl", "loss"])
def test_a_hopeless_trial_stops_early_and_never_wrongly(criterion: str) -> None:
    """At every bar: what is given up lies at or below it, and what is not is the exact value."""
    exact = Trials(session_of(make_model(num_hidden_layers=8)), criterion, "mean")(1, 4, ()).value
    stopped = set()
    for bar in (exact - 0.5, exact - 1e-6, exact + 1e-6, exact + 0.1, exact + 3.0):
        trials = Trials(session_of(make_model(num_hidden_layers=8)), criterion, "mean")
        found = trials(1, 4, (), bound=bar)
        if found.samples is None:
            assert found.value == exact
        else:
            assert found.samples in (2, 4)
            assert exact <= bar and found.value <= bar
        stopped.add(found.samples is not None)
        # Asked for the whole value later, the trial goes on from the samples that it has.
        assert trials(1, 4, ()).value == exact
    assert stopped == {True, False}


def test_best_takes_the_rule_that_keeps_most() -> None:
    """The value is the greatest over all candidate rules, each measured on its own."""
    trials = Trials(session_of(make_model(num_hidden_layers=8)), "loss", "best")
    found = trials(2, 4, ())
    values = {}
    influence = block_influence(
        session_of(make_model(num_hidden_layers=8)).view,
        session_of(make_model(num_hidden_layers=8)).captured(),
    )[2:5]
    shares = ",".join(f"{share / sum(influence):.6f}" for share in influence)
    for rule in ("telescoped", "keep_high", "keep_low", "mean", "rdsc", f"weighted({shares})"):
        values[rule] = oracle("loss", (Run(2, 4, rule),))
    assert found.run.rule == max(values, key=lambda rule: values[rule])
    assert found.value == pytest.approx(max(values.values()), abs=2e-5)


def test_a_journal_goes_on_where_a_search_was_killed(tmp_path: Path) -> None:
    """With any beginning of the journal, the search ends with the same plan and makes the rest."""
    target, options = Target(layers_removed=3), SlmOptions(criterion="loss")

    def plan(folder: Path | None) -> str:
        session = session_of(make_model(num_hidden_layers=8))
        session.journals = folder
        return SlidingLayerMerging(options, target).plan(session).to_json()

    expected = plan(None)
    assert plan(tmp_path) == expected
    (file,) = tmp_path.glob("*.jsonl")
    whole = file.read_text()
    lines = whole.splitlines(keepends=True)
    for kept in (0, 1, len(lines) // 2, len(lines) - 1):
        # A killed process leaves its last line cut short.
        file.write_text("".join(lines[:kept]) + lines[kept][: len(lines[kept]) // 2])
        assert plan(tmp_path) == expected
        assert file.read_text() == whole


def test_another_model_or_set_has_another_journal(tmp_path: Path) -> None:
    """Values are only shared where everything that they depend on is equal."""
    for seed, length in ((0, 10), (1, 10), (0, 8)):
        session = Session(make_model(seed=seed), calibration=TOKENS[:, :length], journals=tmp_path)
        SlidingLayerMerging(SlmOptions(), Target(threshold=0.9)).plan(session)
    assert len(list(tmp_path.glob("*.jsonl"))) == 3


def test_a_journal_in_memory_needs_no_disk() -> None:
    """Without a path nothing is read and nothing is written."""
    journal = Journal(Store())
    journal.add((Run(0, 1, "mean"),), [0.5])
    assert journal.cached((Run(0, 1, "mean"),)) == [[0.5]]
    assert journal.cached((Run(0, 2, "mean"),)) == []


def test_block_influence_is_the_definition(family: str) -> None:
    """One minus the cosine of input and output, per token, the last layer before the final norm."""
    model = make_model(family)
    session = session_of(model)
    outputs: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_hook(
            lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
        )
        for layer in model.model.layers
    ]
    with torch.inference_mode():
        states = [model.model.embed_tokens(TOKENS)]
        model(TOKENS)
    for hook in hooks:
        hook.remove()
    states += outputs
    expected = [
        1 - torch.nn.functional.cosine_similarity(a, b, dim=-1).mean().item()
        for a, b in itertools.pairwise(states)
    ]
    assert block_influence(session.view, session.captured()) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("threshold", [0.2, 0.6, 0.9, 1.01])
def test_layers_run_no_oftener_than_the_walk_needs(threshold: float) -> None:
    """One forward of every layer to capture, then the merged layer and those above, each trial."""
    model = make_model(num_hidden_layers=8)
    forwards = 0

    def count(_module: torch.nn.Module, args: tuple[torch.Tensor, ...], _output: object) -> None:
        nonlocal forwards
        forwards += len(args[0])

    kind = type(model.model.layers[0])
    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, output: count(module, args, output) if type(module) is kind else None
    )
    try:
        # A trial of one batch cannot stop early.
        session = session_of(model, batch_tokens=10_000)
        plan = SlidingLayerMerging(SlmOptions(), Target(threshold=threshold)).plan(session)
    finally:
        hook.remove()
    needed = 8
    for trial in plan.trials:
        above = 8 - 1 - trial.last - sum(last - first for first, last in trial.committed)
        needed += 1 + above
    assert forwards == needed * len(TOKENS)


@pytest.mark.parametrize("rule", [DROP, "telescoped", "keep_low", "keep_high"])
def test_a_trial_copies_no_weight(rule: str) -> None:
    """Every weight that runs is one of the model's own where a rule drops or only chooses."""
    model = make_model(num_hidden_layers=8)
    session = session_of(model)
    session.captured()
    own = {p.data_ptr() for p in model.parameters()}
    ran: list[int] = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, _args: ran.extend(p.data_ptr() for p in module.parameters())
    )
    try:
        trials = Trials(session, "flat_cosine", rule)
        trials(5, 6, ())
        trials(1, 3, (Run(5, 6, rule),), base=(Run(5, 6, rule),))
    finally:
        hook.remove()
    assert ran and set(ran) <= own


def test_a_search_holds_one_merged_layer_a_run() -> None:
    """What was merged for a trial is removed when another is made."""
    model = make_model(num_hidden_layers=9)
    kind, own = type(model.model.layers[0]), set(model.model.layers)
    alive: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()
    most: list[int] = []

    def look(module: torch.nn.Module, _args: object) -> None:
        if type(module) is kind and module not in own:
            alive.add(module)
            gc.collect()
            most.append(len(alive))

    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    # What is there already need not be searched at every layer.
    gc.freeze()
    try:
        options = SlmOptions(merge_rule="mean")
        plan = SlidingLayerMerging(options, Target(threshold=0.6)).plan(session_of(model))
    finally:
        gc.unfreeze()
        hook.remove()
    runs = 1 + max(len(trial.committed) for trial in plan.trials)
    assert len(plan.trials) > 6
    assert 0 < max(most) <= runs


def overflowing() -> PreTrainedModel:
    """A model that is finite only while layers 1 to 4 are all there and take turns.

    They add and take away the largest numbers of float32; two additions in a row are infinite,
    and an infinite number is NaN behind the next norm.
    """
    model = make_model(mlp_bias=True)
    with torch.no_grad():
        for index, number in ((1, 3e38), (2, -3e38), (3, 3e38), (4, -3e38)):
            model.model.layers[index].mlp.down_proj.bias[0] = number
    return model


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize(("rule", "window"), [(DROP, (2, 2)), ("keep_high", (2, 3))])
def test_a_trial_that_is_nan_is_an_error(
    criterion: str, rule: str, window: tuple[int, int]
) -> None:
    """It loses no comparison, though the original model and every other trial are finite."""
    session = session_of(overflowing())
    assert all(torch.isfinite(batch.final).all() for batch in session.captured())
    trials = Trials(session, criterion, rule)
    assert math.isfinite(trials(0, 0, ()).value)
    with pytest.raises(NumericalError, match="NaN"):
        trials(*window, ())


@pytest.mark.parametrize(
    ("name", "options", "target"),
    [
        ("slm", {}, Target(threshold=0.5)),
        ("slm", {"search": "greedy"}, Target(layers_removed=1)),
        ("slm", {"search": "budgeted"}, Target(layers_removed=1)),
        ("laco", {"layers_per_merge": 2}, Target(threshold=0.5)),
        ("sleb", {}, Target(layers_removed=1)),
        ("shapley", {}, Target(layers_removed=1)),
        ("shapley", {"samples": 20}, Target(layers_removed=1)),
        ("shortened", {"keep_list": False}, Target(layers_removed=1)),
        ("sublayer", {}, Target(layers_removed=1)),
    ],
)
def test_no_search_passes_over_a_nan(name: str, options: dict[str, object], target: Target) -> None:
    """Of a model that is finite as long as it is whole, the plan is an error."""
    kind = pruners.get(name)
    with pytest.raises(NumericalError, match="similarity of a trial is NaN"):
        kind(kind.Options(**options), target).plan(session_of(overflowing()))
