"""What holds for every strategy that drops whole layers."""

from __future__ import annotations

import pytest
import torch

from slm_plugin.errors import CalibrationError, NumericalError, TargetError
from slm_plugin.models.fingerprint import fingerprint
from slm_plugin.plans import DropLayers, PruningPlan
from slm_plugin.pruners.depth.dropping import lowest
from slm_plugin.registry import pruners
from slm_plugin.session import Session, apply
from slm_plugin.target import Target
from tests.pruners.depth.strategies import (
    TOKENS,
    greedy,
    make_identity,
    own_text,
    planned,
    removed,
    session_of,
)
from tests.tiny import make_model

# A strategy, options that let it take nearly all of a tiny model, and the most of 6 it can drop.
STRATEGIES = [
    ("block_influence", {}, 5),
    ("angular", {}, 5),
    ("deepest", {}, 5),
    ("layer_sparsity", {}, 5),
    ("layer_sparsity", {"by": "owl"}, 5),
    ("sleb", {}, 4),
    ("repaired", {"repair": "none"}, 5),
    ("repaired", {"repair": "none", "polish": 3}, 5),
    ("shapley", {"samples": 60}, 5),
    ("shortened", {"score": "loss", "keep_list": False}, 5),
    ("shortened", {"score": "taylor", "keep_list": False}, 5),
    ("shortened", {"score": "magnitude", "keep_list": False}, 5),
]
OPTIONS = [
    pytest.param(name, options, id="-".join([name, *map(str, options.values())]))
    for name, options, _ in STRATEGIES
]
# Those that look at what the model does with data.
WITHOUT_DATA = ("deepest", "layer_sparsity", "shortened-magnitude-False")
MEASURING = [case for case in OPTIONS if case.id not in WITHOUT_DATA]
# Outliers do not tell what a layer changes.
CHANGES = [case for case in MEASURING if case.id != "layer_sparsity-owl"]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_plan_applies_and_the_model_generates(
    family: str, name: str, options: dict[str, object]
) -> None:
    """Exactly the planned layers go, and greedy tokens agree with and without KV cache."""
    model = make_model(family, num_hidden_layers=7)
    layers = list(model.model.layers)
    session = session_of(model)
    plan = planned(name, model, 3, **options)
    assert plan.layers_removed == len(set(removed(plan))) == 3
    apply(plan, session)
    kept = [layer for index, layer in enumerate(layers) if index not in removed(plan)]
    assert list(model.model.layers) == kept
    assert torch.equal(greedy(model, use_cache=True), greedy(model, use_cache=False))


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_planning_leaves_the_model_as_it_is(
    family: str, name: str, options: dict[str, object]
) -> None:
    """No bit, no layer, no gradient, no gradient flag and no hook changes."""
    model = make_model(family)
    layers, before = list(model.model.layers), fingerprint(model)
    planned(name, model, 2, **options)
    assert list(model.model.layers) == layers
    assert fingerprint(model) == before
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(("name", "options"), CHANGES)
@pytest.mark.parametrize(("family", "count"), [("llama", 1), ("qwen2", 3)])
def test_planted_identity_layers_go_first(
    family: str, name: str, options: dict[str, object], count: int
) -> None:
    """A run of layers that do nothing is found, and no logit changes when it goes."""
    model = make_model(family, num_hidden_layers=8)
    planted = [4, 5, 6][:count]
    make_identity(model, planted)
    session = session_of(model)
    with torch.no_grad():
        tokens = own_text(model)
        before = model(TOKENS).logits
        plan = planned(name, model, count, tokens=tokens, **options)
        assert sorted(removed(plan)) == planted
        apply(plan, session)
        assert torch.equal(model(TOKENS).logits, before)


@pytest.mark.parametrize(("name", "options"), MEASURING)
def test_the_order_of_samples_does_not_matter(name: str, options: dict[str, object]) -> None:
    """Shuffled calibration data, and other batches of it, give the same layers."""
    shuffled = TOKENS[torch.tensor([4, 2, 0, 5, 1, 3])]
    kind = pruners.get(name)
    found = {
        tuple(removed(kind(kind.Options(**options), Target(layers_removed=3)).plan(session)))
        for session in (
            session_of(make_model(num_hidden_layers=6)),
            session_of(make_model(num_hidden_layers=6), calibration=shuffled),
            session_of(make_model(num_hidden_layers=6), batch_tokens=10_000),
        )
    }
    assert len(found) == 1


@pytest.mark.parametrize(("name", "options", "most"), STRATEGIES)
def test_all_sizes_up_to_the_greatest(name: str, options: dict[str, object], most: int) -> None:
    """One, half and all that can go go exactly, and one more is refused with the limit."""
    for wanted in (1, most // 2, most):
        assert (
            len(removed(planned(name, make_model(num_hidden_layers=6), wanted, **options)))
            == wanted
        )
    with pytest.raises(TargetError, match=rf"at most {most} of 6|the model has 6"):
        planned(name, make_model(num_hidden_layers=6), 6 if most == 5 else most + 1, **options)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_ratio_and_parameters_become_the_nearest_number_of_layers(
    name: str, options: dict[str, object]
) -> None:
    """2.4 layers' worth of parameters are two layers, and the first note states their share."""
    dims = session_of(make_model(num_hidden_layers=6)).original
    share = dims.layer_parameters / dims.parameters
    for target in (
        Target(ratio=2.4 * share),
        Target(parameters=dims.parameters - int(2.4 * dims.layer_parameters)),
    ):
        plan = planned(name, make_model(num_hidden_layers=6), target, **options)
        assert plan.layers_removed == 2
        assert plan.parameters_removed == 2 * dims.layer_parameters
        assert plan.notes[0] == f"2 layers are {2 * share:.2%} of the original parameters"


def test_a_second_stage_states_its_share_of_the_original_model() -> None:
    """As its ratio does, the note counts what the model had before the first stage."""
    session, kind = session_of(make_model(num_hidden_layers=8)), pruners.get("deepest")
    pruner = kind(kind.Options(), Target(layers_removed=2))
    session.apply(session.plan(pruner))
    share = 2 * session.original.layer_parameters / session.original.parameters
    assert session.plan(pruner).notes[0] == f"2 layers are {share:.2%} of the original parameters"


@pytest.mark.parametrize("name", ["block_influence", "angular", "sleb", "shapley"])
def test_protected_ends_stay(name: str) -> None:
    """Identity layers at the ends stay where they are protected; more than the rest is refused."""
    model = make_model(num_hidden_layers=8)
    make_identity(model, [0, 1, 6, 7])
    ends = {"protect_first": 2, "protect_last": 2}
    for wanted in (1, 4):
        assert set(removed(planned(name, model, wanted, **ends))) <= {2, 3, 4, 5}
    with pytest.raises(TargetError, match="protect_first 2 and protect_last 2 at most 4 of 8"):
        planned(name, model, 5, **ends)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_written_plan_is_read_again(
    name: str, options: dict[str, object], tmp_path: pytest.TempPathFactory
) -> None:
    """Scores and all, the plan survives its file, and its options make the same strategy."""
    plan = planned(name, make_model(), 2, **options)
    file = tmp_path / "plan.json"  # type: ignore[operator]
    plan.write(file)
    assert PruningPlan.read(file) == plan
    kind = pruners.get(name)
    assert kind.Options(**plan.options) == kind.Options(**options)


@pytest.mark.parametrize(("name", "options"), MEASURING)
def test_a_model_that_gives_nan_is_refused(name: str, options: dict[str, object]) -> None:
    """NaN neither wins nor loses a comparison."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(NumericalError):
        planned(name, model, 1, **options)


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_a_strategy_says_whether_it_needs_calibration(
    name: str, options: dict[str, object]
) -> None:
    """Without a calibration set it plans all the same, or tells what is missing."""
    kind = pruners.get(name)
    pruner = kind(kind.Options(**options), Target(layers_removed=1))
    if pruner.needs_calibration:
        with pytest.raises(CalibrationError):
            pruner.plan(Session(make_model()))
    else:
        assert pruner.plan(Session(make_model())).layers_removed == 1


def test_of_equal_scores_the_lowest_layer_goes() -> None:
    """The order is by score, then by index, and only eligible layers take part."""
    assert lowest([1.0, 0.0, 2.0, 0.0, 0.0], 2, [1, 2, 3, 4]) == [1, 3]
    assert lowest([1.0, 0.0, 2.0, 0.0, 0.0], 2, [0, 2, 4]) == [4, 0]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_score_that_is_no_number_is_refused(bad: float) -> None:
    """Also where the layer is not eligible."""
    with pytest.raises(NumericalError, match="layer 1 is"):
        lowest([1.0, bad, 2.0], 1, [0])


def test_plans_that_drop_layer_by_layer_can_be_cut() -> None:
    """The first operations of a plan are the smaller plan of the same strategy."""
    options = {"shapley": {"samples": 20}}
    for name in ("block_influence", "deepest", "sleb", "shapley"):
        plan = planned(name, make_model(num_hidden_layers=6), 4, **options.get(name, {}))
        smaller = planned(name, make_model(num_hidden_layers=6), 2, **options.get(name, {}))
        assert plan.upto(2).operations == smaller.operations
        assert plan.upto(2).after == smaller.after
        assert all(isinstance(op, DropLayers) and len(op.indices) == 1 for op in plan.operations)
