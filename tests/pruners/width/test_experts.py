"""Tests of slm_plugin.pruners.width.experts and of the scores of experts."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from transformers import PreTrainedModel

from slm_plugin.errors import CalibrationError, NumericalError, PlanError, TargetError
from slm_plugin.inspection import inspection
from slm_plugin.models.families import families
from slm_plugin.models.view import DecoderView, experts_of
from slm_plugin.plans import KeepExperts, PruningPlan
from slm_plugin.pruners.width.expert_budget import experts_to_remove
from slm_plugin.pruners.width.expert_scores import given_weights, routed_mass, taylor
from slm_plugin.pruners.width.experts import ExpertPruning, ExpertsOptions
from slm_plugin.registry import pruners
from slm_plugin.report import pictures
from slm_plugin.report.explain import explain
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.surgery.test_experts import EXPERTS, LAYERS, MIXTURES, make, routers
from tests.tiny import make_model, random_tokens

TOKENS = random_tokens(4, 16)
IMPORTANCES = ("routed_mass", "taylor")


@pytest.fixture(params=sorted(MIXTURES))
def mixture(request: pytest.FixtureRequest) -> str:
    """Every family of mixtures, by both ways to weigh the chosen experts."""
    return str(request.param)


def planned(
    model: PreTrainedModel, target: Target | None = None, **options: Any
) -> tuple[Session, PruningPlan]:
    """A session and the plan of the strategy in it."""
    session = Session(model, calibration=TOKENS)
    pruner = ExpertPruning(ExpertsOptions(**options), target or one_less(model))
    return session, session.plan(pruner)


def one_less(model: PreTrainedModel, number: int = 1) -> Target:
    """The size of the model with fewer experts in every layer."""
    dimensions = DecoderView.of(model).dimensions()
    return Target(parameters=dimensions.without_units(experts=number).parameters)


def scored(model: PreTrainedModel, importance: str) -> list[list[float]]:
    """Scores of all experts, a list per layer."""
    score = taylor if importance == "taylor" else routed_mass
    found = score(DecoderView.of(model), TOKENS.split(3))
    assert [(one.layer, one.unit) for one in found] == [(i, "expert") for i in range(LAYERS)]
    return [list(one.scores) for one in found]


def parts(
    layer: torch.nn.Module, model: PreTrainedModel
) -> tuple[torch.nn.Module, torch.nn.Module]:
    """The MLP of a layer and its experts."""
    found = experts_of(layer, DecoderView.of(model).family)
    assert found is not None
    return found.block, found.experts


def alone(experts: torch.nn.Module, number: int, hidden: torch.Tensor) -> torch.Tensor:
    """Output of one expert for every token, with the weight 1."""
    if isinstance(experts, torch.nn.ModuleList):
        found: torch.Tensor = experts[number](hidden)
        return found
    indices = torch.full((len(hidden), 1), number)
    weights = torch.ones(len(hidden), 1)
    # gpt-oss in 4.57 takes a weight for every expert.
    if "chosen by column" in _weights_by(experts):
        weights = torch.zeros(len(hidden), EXPERTS).index_fill_(1, torch.tensor(number), 1.0)
    found = experts(hidden, indices, weights)
    return found.view_as(hidden)


def _weights_by(experts: torch.nn.Module) -> str:
    import inspect

    source = inspect.getsource(type(experts).forward)
    return "chosen by column" if "routing_weights.shape[1]" in source else "chosen by place"


def silenced(experts: torch.nn.Module, but: int | None) -> None:
    """All experts but one put out zero."""
    for name, parameter in experts.named_parameters():
        if isinstance(experts, torch.nn.ModuleList):
            last = name.partition(".")[2].startswith(("down_proj", "w2"))
            if last and int(name.partition(".")[0]) != but:
                parameter.zero_()
        elif name.startswith("down_proj"):
            parameter[[i for i in range(EXPERTS) if i != but]] = 0


def block_output(block: torch.nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What the MLP adds to the residual stream, ``(tokens, hidden)``."""
    found = block(hidden[None])
    return (found[0] if isinstance(found, tuple) else found).view_as(hidden)


def test_routed_mass_is_what_the_layer_multiplies_by(mixture: str) -> None:
    """By running the block with one expert alone: output / output of the expert, for every token.

    What a shared expert puts out is subtracted first.
    """
    model = make(mixture)
    layer = model.model.layers[1]
    block, _ = parts(layer, model)
    seen: list[torch.Tensor] = []
    hook = block.register_forward_pre_hook(lambda module, given: seen.append(given[0].detach()))
    found = scored(model, "routed_mass")[1]
    hook.remove()
    hidden = torch.cat([one.flatten(0, 1) for one in seen])
    assert len(hidden) == TOKENS.numel()
    with torch.no_grad():
        none = copy.deepcopy(layer)
        silenced(parts(none, model)[1], None)
        shared = block_output(parts(none, model)[0], hidden)
        for number in range(EXPERTS):
            one = copy.deepcopy(layer)
            silenced(parts(one, model)[1], number)
            lone_block, lone_experts = parts(one, model)
            output = alone(lone_experts, number, hidden)
            given = block_output(lone_block, hidden) - shared
            weights = (given * output).sum(-1) / output.square().sum(-1)
            assert float(weights.sum()) == pytest.approx(found[number], rel=1e-3, abs=1e-4)
    total = sum(found)
    if mixture.endswith(("normalised", "mixtral", "gpt_oss")):
        assert total == pytest.approx(TOKENS.numel(), rel=1e-5)
    else:
        assert total < 0.999 * TOKENS.numel()


def test_taylor_sums_weight_times_gradient(mixture: str) -> None:
    """It equals the written-out sum of |w * dL/dw| with the gradient of one whole batch."""
    model = make(mixture)
    found = scored(model, "taylor")
    model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    for index, layer in enumerate(model.model.layers):
        wanted = [0.0] * EXPERTS
        for name, weight in parts(layer, model)[1].named_parameters():
            if name.endswith("bias") or weight.grad is None:
                continue
            product = (weight.detach() * weight.grad).abs().double()
            if name[0].isdigit():
                wanted[int(name.partition(".")[0])] += float(product.sum())
            else:
                for number in range(EXPERTS):
                    wanted[number] += float(product[number].sum())
        assert found[index] == pytest.approx(wanted, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_an_expert_that_no_token_has_goes_first(mixture: str, importance: str) -> None:
    """Its score is 0 by either importance, and the model without it is the same one."""
    model, useless = make(mixture), (4, 0, 2)
    with torch.no_grad():
        # One feature is positive in every state, so a logit can be negative for every token. It is
        # large in the stream and small behind the norms, so that nothing else depends on it.
        model.model.embed_tokens.weight.mul_(10)[:, 0] = 20
        layers = zip(model.model.layers, routers(model), useless, strict=True)
        for layer, router, number in layers:
            layer.input_layernorm.weight[0] = 0
            layer.post_attention_layernorm.weight[0] = 0.01
            router.weight[number] = 0
            router.weight[number, 0] = -1e4
        whole = model(TOKENS, use_cache=False).logits
    session = Session(model, calibration=random_tokens(16, 32))
    options = ExpertsOptions.model_validate({"importance": importance})
    plan = session.plan(ExpertPruning(options, one_less(model)))
    for entry, number in zip(plan.scores, useless, strict=True):
        assert entry.scores[number] == 0
        assert sorted(entry.scores)[1] > 0
    for operation, number in zip(plan.operations, useless, strict=True):
        assert isinstance(operation, KeepExperts)
        assert operation.experts == tuple(i for i in range(EXPERTS) if i != number)
    session.apply(plan)
    with torch.no_grad():
        found = model(TOKENS, use_cache=False).logits
    assert torch.allclose(found, whole, atol=1e-5)


def test_permuted_experts_have_permuted_scores(mixture: str) -> None:
    """The order of experts means nothing."""
    order = [3, 1, 5, 0, 2, 4]
    model = make(mixture)
    before = {importance: scored(model, importance) for importance in IMPORTANCES}
    with torch.no_grad():
        for layer, router in zip(model.model.layers, routers(model), strict=True):
            experts = parts(layer, model)[1]
            for _, parameter in router.named_parameters():
                parameter.copy_(parameter[order].clone())
            if isinstance(experts, torch.nn.ModuleList):
                moved = [experts[number] for number in order]
                for place, module in enumerate(moved):
                    experts[place] = module
            else:
                for _, parameter in experts.named_parameters():
                    parameter.copy_(parameter[order].clone())
    for importance in IMPORTANCES:
        for former, found in zip(before[importance], scored(model, importance), strict=True):
            assert found == pytest.approx([former[i] for i in order], rel=1e-4)


@pytest.mark.parametrize("importance", IMPORTANCES)
def test_a_plan_keeps_the_best_of_every_layer(mixture: str, importance: str) -> None:
    """Its scores say which; it survives JSON, promises what surgery leaves, and says so."""
    model = make(mixture)
    session, plan = planned(model, one_less(model, 3), importance=importance)
    for found, wanted in zip(plan.scores, scored(model, importance), strict=True):
        assert found.scores == pytest.approx(wanted, rel=1e-4)
    for operation, entry in zip(plan.operations, plan.scores, strict=True):
        assert isinstance(operation, KeepExperts)
        gone = set(range(EXPERTS)) - set(operation.experts)
        assert len(gone) == 3
        assert max(entry.scores[i] for i in gone) <= min(entry.scores[i] for i in operation.experts)
    assert plan.after.experts == 3
    assert "every layer keeps 3 of 6 experts" in plan.notes[0]
    again = PruningPlan.parse(plan.to_json())
    assert again == plan
    session.apply(again)
    assert session.view.dimensions() == plan.after


def test_batches_make_no_difference(mixture: str) -> None:
    """Sums over all tokens, whatever the size of a batch."""
    view = DecoderView.of(make(mixture))
    for score in (routed_mass, taylor):
        whole, cut = score(view, [TOKENS]), score(view, TOKENS.split(1))
        for one, other in zip(whole, cut, strict=True):
            assert one.scores == pytest.approx(other.scores, rel=1e-4)


def test_weights_by_place_and_by_expert_are_the_same() -> None:
    """Releases differ in what a router class puts out; logits are weighed as stated."""
    logits = torch.tensor([[2.0, 0.0, 1.0, -1.0], [0.0, 0.0, 3.0, 1.0]])
    probabilities = logits.softmax(-1)
    weights, indices = probabilities.topk(2)
    by_expert = torch.zeros(2, 4).scatter_(1, indices, weights)
    expected = by_expert.sum(0).double()
    for output in (logits, (logits, weights, indices), (by_expert, indices)):
        assert torch.allclose(given_weights(output, 4, 2, False), expected)
    divided = given_weights(logits, 4, 2, True)
    assert float(divided.sum()) == pytest.approx(2)
    assert torch.allclose(divided, (by_expert / by_expert.sum(-1, keepdim=True)).sum(0).double())


@pytest.mark.parametrize(
    ("removed", "number"), [(0.51, 1), (1.0, 1), (1.49, 1), (1.51, 2), (3.7, 4), (4.49, 4)]
)
def test_the_number_is_the_nearest(removed: float, number: int) -> None:
    """To half an expert of every layer, of a ratio and of a size alike."""
    sizes = DecoderView.of(make("mixtral")).dimensions()
    scalars = removed * sizes.layers * sizes.expert_parameters
    for target in (
        Target(ratio=scalars / sizes.parameters),
        Target(ratio=scalars / sizes.parameters, of="current"),
        Target(parameters=round(sizes.parameters - scalars)),
    ):
        assert experts_to_remove(target, sizes, sizes) == number


@pytest.mark.parametrize(
    ("target", "words"),
    [
        (Target(ratio=0.9), "experts; the router chooses 2 for each token.*at most 4 can be"),
        (Target(ratio=0.01), "less than half an expert of every layer.*one expert of every layer"),
        (Target(parameters=10**9), "removes nothing"),
    ],
)
def test_a_target_out_of_reach_is_told(target: Target, words: str) -> None:
    """Before any work, in a line, with sizes that can be reached."""
    session = Session(make("qwen3_moe"), calibration=TOKENS)
    pruner = ExpertPruning(ExpertsOptions(), target)
    with pytest.raises(TargetError, match=words) as caught:
        pruner.check_target(session.original, session.original)
    assert "\n" not in str(caught.value)
    with pytest.raises(TargetError, match=words):
        session.plan(pruner)
    for ratio in (part.split()[0] for part in str(caught.value).split("ratio ")[1:]):
        assert experts_to_remove(Target(ratio=float(ratio)), session.original, session.original)


def test_a_router_that_chooses_all_leaves_none_to_remove() -> None:
    """As many experts as each token has."""
    sizes = DecoderView.of(make("mixtral", num_experts_per_tok=EXPERTS)).dimensions()
    with pytest.raises(TargetError, match="no expert can be removed: the router chooses 6"):
        experts_to_remove(Target(ratio=0.3), sizes, sizes)


def test_a_model_without_experts_is_told() -> None:
    """Where nothing has asked before whether the strategy suits it."""
    session = Session(make_model(num_hidden_layers=2), calibration=TOKENS)
    with pytest.raises(TargetError, match="LlamaForCausalLM is no mixture of experts"):
        session.plan(ExpertPruning(ExpertsOptions(), Target(ratio=0.2)))


def test_gradients_and_flags_stay_with_their_weights(mixture: str) -> None:
    """Modules of a list move to other names; what is cut has no gradient of the former shape."""
    model = make(mixture)
    model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss.backward()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 > 0)
    facts = {id(p): (p, p.grad, p.requires_grad) for p in model.parameters()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    session, plan = planned(model, one_less(model, 2))
    session.apply(plan)
    kept = 0
    for name, parameter in model.named_parameters():
        same, grad, flag = facts.get(id(parameter), (None, None, flags[name]))
        kept += same is parameter
        assert parameter.grad is grad, name
        assert parameter.requires_grad == flag, name
    assert kept > LAYERS


def test_two_stages_add_up() -> None:
    """Ratios are shares of the model as it was loaded."""
    model = make("gpt_oss")
    session, first = planned(model)
    session.apply(first)
    share = first.parameters_removed / session.original.parameters
    second = session.plan(ExpertPruning(ExpertsOptions(), Target(ratio=share)))
    assert second.parameters_removed == first.parameters_removed
    session.apply(second)
    assert session.view.dimensions().experts == EXPERTS - 2


def test_what_is_missing_is_told() -> None:
    """No calibration set, a model that computes NaN, an option that does not exist."""
    model = make("mixtral")
    pruner = ExpertPruning(ExpertsOptions(), one_less(model))
    with pytest.raises(CalibrationError):
        Session(model).plan(pruner)
    with torch.no_grad():
        routers(model)[1].weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="layer 1 has scores that are NaN"):
        Session(model, calibration=TOKENS).plan(pruner)
    with pytest.raises(ValidationError, match="'routed_mass' or 'taylor'"):
        ExpertsOptions(importance="magnitude")  # type: ignore[arg-type]


def test_only_mixtures_are_suited() -> None:
    """By name and reason; torch_pruning is refused for them as before."""
    assert pruners.get("experts") is ExpertPruning
    mixtures = {"mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"}
    for family in families():
        if family.listed:
            reason = ExpertPruning.unsuited(family, {})
            mixture = family.model_type in mixtures
            assert reason == ("" if mixture else "its MLP is no mixture of experts")
            refused = pruners.get("torch_pruning").unsuited(family, {})
            assert not mixture or refused == "its MLP is a mixture of experts"


def test_too_few_experts_are_told_when_a_plan_is_read() -> None:
    """A hand-made plan names the operation and the limit."""
    _, plan = planned(make("qwen2_moe"))
    first, *rest = plan.operations
    assert isinstance(first, KeepExperts)
    few = plan.model_copy(
        update={"operations": (first.model_copy(update={"experts": (1,)}), *rest)}
    )
    with pytest.raises(PlanError, match=r"operations\.0\.experts: keeps 1 experts; .* chooses 2"):
        PruningPlan.parse(few.to_json())


def test_reports_say_which_experts_stay() -> None:
    """In the text and the table of `explain`, in the picture, and in `inspect`."""
    model = make("mixtral")
    _, plan = planned(model)
    told = explain(plan)
    assert "Experts:        6 -> 5" in told.text
    assert [len(table.rows) for table in told.tables] == [LAYERS]
    found = inspection(DecoderView.of(model))["units"]["expert in every layer"]
    assert found == {"count": EXPERTS, "parameters": LAYERS * plan.before.expert_parameters}
    pytest.importorskip("matplotlib")
    svg = pictures.widths(plan)
    assert all(f'id="widths-expert-{layer}"' in svg for layer in range(LAYERS))
    assert "widths-kv_group" not in svg
