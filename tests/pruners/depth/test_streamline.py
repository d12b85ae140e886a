"""Streamline's choice of a span, and the one layer that stays for it."""

from __future__ import annotations

import pytest
import torch

from slm_plugin.errors import NumericalError, TargetError
from slm_plugin.models.fingerprint import fingerprint
from slm_plugin.plans import MergeLayers, PruningPlan
from slm_plugin.session import apply
from slm_plugin.target import Target
from tests.pruners.depth.strategies import (
    TOKENS,
    greedy,
    layer_outputs,
    make_identity,
    planned,
    session_of,
)
from tests.tiny import make_model


def span(plan: PruningPlan) -> tuple[int, int]:
    """The layers that the plan's only operation merges."""
    (operation,) = plan.operations
    assert isinstance(operation, MergeLayers) and operation.rule == "keep_low"
    return operation.first, operation.last


@pytest.mark.parametrize("wanted", [1, 2, 5])
def test_the_span_is_the_arg_max_of_the_definition(family: str, wanted: int) -> None:
    """Of all spans of n + 1 layers, by the cosine per token, the last state before the norm."""
    model = make_model(family)
    states = [state.double() for state in layer_outputs(model, TOKENS)]
    expected = [
        torch.nn.functional.cosine_similarity(states[j], states[j + wanted + 1], dim=-1)
        .mean()
        .item()
        for j in range(6 - wanted)
    ]
    plan = planned("streamline", model, wanted)
    first = expected.index(max(expected))
    assert span(plan) == (first, first + wanted)
    assert plan.layers_removed == wanted
    assert plan.layer_scores is not None
    assert plan.layer_scores.scores == pytest.approx([1 - one for one in expected], abs=1e-6)


def test_layers_that_do_nothing_above_a_real_one_are_taken_with_it() -> None:
    """The light layer starts as the lowest of the span; no logit changes when the rest was idle."""
    model = make_model(num_hidden_layers=8)
    with torch.no_grad():
        # Of the real layers the third is the one that turns least.
        for linear in (model.model.layers[3].self_attn.o_proj, model.model.layers[3].mlp.down_proj):
            linear.weight.mul_(0.1)
    make_identity(model, [4, 5])
    session = session_of(model)
    low = {name: tensor.clone() for name, tensor in model.model.layers[3].state_dict().items()}
    with torch.no_grad():
        before = model(TOKENS).logits
        plan = planned("streamline", model, 2)
        assert span(plan) == (3, 5)
        apply(plan, session)
        assert torch.equal(model(TOKENS).logits, before)
    assert session.sources[3] == (3, 5)
    light = model.model.layers[3].state_dict()
    assert all(torch.equal(light[name], tensor) for name, tensor in low.items())


def test_planning_leaves_the_model_as_it_is() -> None:
    """Neither a layer nor a bit of one changes."""
    model = make_model()
    layers, before = list(model.model.layers), fingerprint(model)
    planned("streamline", model, 2)
    assert list(model.model.layers) == layers
    assert fingerprint(model) == before


def test_a_span_at_either_end_can_be_the_one() -> None:
    """Also up to the top layer, whose output is taken before the final norm."""
    for planted in ([0, 1, 2], [5, 6, 7]):
        model = make_model(num_hidden_layers=8)
        make_identity(model, planted)
        plan = planned("streamline", model, 2)
        assert span(plan) == (planted[0], planted[-1])
        assert plan.layer_scores is not None
        assert plan.layer_scores.scores[planted[0]] == pytest.approx(0, abs=1e-12)


def test_of_equal_spans_the_lowest_goes() -> None:
    """Three spans of two fit into four layers that do nothing."""
    model = make_model(num_hidden_layers=8)
    make_identity(model, [2, 3, 4, 5])
    assert span(planned("streamline", model, 1)) == (2, 3)


def test_protected_ends_bound_the_span() -> None:
    """All sizes up to the greatest lie between them, and one more is refused with the limit."""
    model = make_model(num_hidden_layers=8)
    make_identity(model, [0, 1, 6, 7])
    ends = {"protect_first": 2, "protect_last": 1}
    for wanted in (1, 2, 4):
        first, last = span(planned("streamline", model, wanted, **ends))
        assert last - first == wanted
        assert first >= 2 and last <= 6
    with pytest.raises(TargetError, match="protect_first 2 and protect_last 1 at most 4 of 8"):
        planned("streamline", model, 5, **ends)
    with pytest.raises(TargetError, match="at most 0 of 8"):
        planned("streamline", model, 1, protect_first=8, protect_last=8)


@pytest.mark.parametrize("wanted", [1, 7])
def test_the_smallest_and_the_greatest_size(wanted: int) -> None:
    """Two layers become one, and all eight; eight cannot go."""
    plan = planned("streamline", make_model(num_hidden_layers=8), wanted)
    assert plan.after.layers == 8 - wanted
    with pytest.raises(TargetError, match="the model has 8"):
        planned("streamline", make_model(num_hidden_layers=8), 8)


def test_a_ratio_becomes_the_nearest_number_of_layers() -> None:
    """2.4 layers' worth of parameters are two layers."""
    dims = session_of(make_model(num_hidden_layers=8)).original
    target = Target(ratio=2.4 * dims.layer_parameters / dims.parameters)
    assert planned("streamline", make_model(num_hidden_layers=8), target).layers_removed == 2


def test_a_span_has_one_kind() -> None:
    """One layer cannot replace full and sliding attention."""
    kinds = ["full_attention"] * 3 + ["sliding_attention"] * 3
    model = make_model("qwen2", use_sliding_window=True, sliding_window=8, layer_types=kinds)
    (merge,) = planned("streamline", model, 2, protect_first=0, protect_last=0).operations
    assert (merge.first, merge.last) in ((0, 2), (3, 5))
    with pytest.raises(TargetError, match="no 4 adjacent layers are of one kind"):
        planned("streamline", model, 3, protect_first=0, protect_last=0)


def test_nan_is_refused() -> None:
    """It neither wins nor loses the comparison."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(NumericalError):
        planned("streamline", model, 1)


def test_a_model_of_a_run_generates_with_a_cache() -> None:
    """Layer indices follow: greedy tokens agree with and without the KV cache."""
    model = make_model()
    session = session_of(model)
    apply(planned("streamline", model, 2), session)
    assert torch.equal(greedy(model, use_cache=True), greedy(model, use_cache=False))
