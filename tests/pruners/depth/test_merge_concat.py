"""CoMe against its card written out over whole models, and what a merged layer may hold."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from slm_plugin.calibration.captures import capture, run_layers
from slm_plugin.errors import NumericalError, PlanError, TargetError
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import ConcatLayers, LayerPart, PruningPlan
from slm_plugin.pruners.depth.measures.sensitivity import sensitivities
from slm_plugin.pruners.depth.merge_concat import narrowed, split, top
from slm_plugin.report.explain import explain
from slm_plugin.report.plan_effects import layer_mapping
from slm_plugin.session import apply
from slm_plugin.surgery.concatenation import concatenated_layer
from tests.pruners.depth.strategies import (
    TOKENS,
    greedy,
    layer_outputs,
    make_identity,
    planned,
    session_of,
)
from tests.tiny import make_model, random_tokens

# KV heads, query heads a KV head, and size of a head in the models here: two groups of queries
# that tiling and interleaving tell apart.
KV, G, D, M = 4, 2, 8, 48


def grouped(family: str = "llama", layers: int = 6, seed: int = 0) -> PreTrainedModel:
    """A model with eight query heads on four KV heads."""
    return make_model(
        family,
        seed=seed,
        num_hidden_layers=layers,
        num_attention_heads=KV * G,
        num_key_value_heads=KV,
        head_dim=D,
    )


@torch.no_grad()
def sensitivity(model: PreTrainedModel, index: int) -> tuple[list[float], list[float]]:
    """Of every channel and every KV group of a layer, by loops over whole forwards."""
    heard: dict[str, Tensor] = {}
    layer = model.model.layers[index]
    hooks = [
        linear.register_forward_hook(lambda m, args, out, key=key: heard.update({key: args[0]}))
        for key, linear in (("z", layer.mlp.down_proj), ("attention", layer.self_attn.o_proj))
    ]
    model(TOKENS)
    for hook in hooks:
        hook.remove()
    down, out = layer.mlp.down_proj.weight, layer.self_attn.o_proj.weight
    channels = [float(heard["z"][..., j].abs().mean() * down[:, j].abs().sum()) for j in range(M)]
    groups = []
    for g in range(KV):
        columns = [h * D + i for h in range(KV * G) if h // G == g for i in range(D)]
        found = [heard["attention"][..., j].abs().mean() * out[:, j].abs().sum() for j in columns]
        groups.append(float(sum(found)) / len(found))
    return channels, groups


def best(scores: list[float], count: int) -> list[int]:
    """Positions of the highest scores, in ascending order."""
    return sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count])


@torch.no_grad()
def merged_pair(model: PreTrainedModel, at: int, share: float) -> PreTrainedModel:
    """A copy with two layers made one, head by head and channel by channel."""
    pair = [model.model.layers[at], model.model.layers[at + 1]]
    shares = [share, 1 - share]
    larger = 0 if share >= 0.5 else 1
    floors = {n: [math.floor(n * s) for s in shares] for n in (M, KV)}
    for n, counts in floors.items():
        counts[larger] += n - sum(counts)
    rows: dict[str, list[Tensor]] = {}
    for side, layer in enumerate(pair):
        channels, groups = sensitivity(model, at + side)
        attention, mlp = layer.self_attn, layer.mlp
        for j in best(channels, floors[M][side]):
            for name in ("gate_proj", "up_proj"):
                rows.setdefault(name, []).append(mlp.get_submodule(name).weight[j])
            rows.setdefault("down_proj", []).append(mlp.down_proj.weight[:, j])
        for g in best(groups, floors[KV][side]):
            for name in ("k_proj", "v_proj"):
                linear = attention.get_submodule(name)
                rows.setdefault(name, []).extend(linear.weight[g * D : (g + 1) * D])
                if linear.bias is not None:
                    rows.setdefault(name + ".b", []).extend(linear.bias[g * D : (g + 1) * D])
            for h in range(g * G, (g + 1) * G):
                for i in range(h * D, (h + 1) * D):
                    rows.setdefault("q_proj", []).append(attention.q_proj.weight[i])
                    rows.setdefault("o_proj", []).append(attention.o_proj.weight[:, i])
                    if attention.q_proj.bias is not None:
                        rows.setdefault("q_proj.b", []).append(attention.q_proj.bias[i])
    short = copy.deepcopy(model)
    layer = short.model.layers[at]
    for name, parameter in layer.named_parameters():
        projection, leaf = name.split(".")[-2:]
        given = [other.get_parameter(name) for other in pair]
        if "norm" in name:
            parameter.copy_((given[0] + given[1]) / 2)
        elif leaf == "bias" and projection in ("o_proj", "down_proj"):
            parameter.copy_(share * given[0] + (1 - share) * given[1])
        else:
            stacked = torch.stack(rows[projection + (".b" if leaf == "bias" else "")])
            parameter.copy_(stacked.T if projection in ("o_proj", "down_proj") else stacked)
    del short.model.layers[at + 1]
    return short


def influences(model: PreTrainedModel) -> list[float]:
    """Block influence of every layer."""
    states = [state.double() for state in layer_outputs(model, TOKENS)]
    return [
        float(1 - torch.cosine_similarity(a, b, dim=-1).mean())
        for a, b in itertools.pairwise(states)
    ]


def pair_distances(model: PreTrainedModel) -> list[float]:
    """Angle of the last token over two layers, as a share of a half turn, by arccos."""
    states = [state[:, -1].double() for state in layer_outputs(model, TOKENS)]
    return [
        float((torch.cosine_similarity(a, b, dim=-1).acos() / math.pi).mean())
        for a, b in zip(states, states[2:], strict=False)
    ]


def brute_force(model: PreTrainedModel, wanted: int) -> PreTrainedModel:
    """The loop over whole models, a merged layer being a layer like any other."""
    for _ in range(wanted):
        distances = pair_distances(model)
        at = distances.index(min(distances))
        low, high = influences(model)[at : at + 2]
        model = merged_pair(model, at, low / (low + high))
    return model


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    """Logits on the calibration set."""
    return model(TOKENS, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("wanted", [1, 3, 5])
@pytest.mark.parametrize("seed", [0, 1])
def test_it_is_the_published_loop(family: str, wanted: int, seed: int) -> None:
    """Pairs, ratios, channels and heads are those of brute force, merges of merges too."""
    model = grouped(family, seed=seed)
    expected = brute_force(model, wanted)
    session = session_of(model)
    plan = planned("merge_concat", model, wanted)
    assert len(plan.notes) == wanted + 1
    assert plan.layer_scores is not None
    assert plan.layer_scores.scores == pytest.approx(pair_distances(model), abs=1e-6)
    apply(plan, session)
    assert len(model.model.layers) == 6 - wanted == len(expected.model.layers)
    torch.testing.assert_close(logits(model), logits(expected), atol=2e-4, rtol=1e-3)
    if wanted == 5:
        (operation,) = plan.operations
        assert isinstance(operation, ConcatLayers) and len(operation.parts) == 6


def test_some_of_these_merges_are_of_merged_layers() -> None:
    """The brute force test above would otherwise say nothing about them."""
    plan = planned("merge_concat", grouped(), 3)
    nested = [op for op in plan.operations if isinstance(op, ConcatLayers) and len(op.parts) > 2]
    nested += [
        op
        for op in planned("merge_concat", grouped(), 5).operations
        if isinstance(op, ConcatLayers) and len({part.norm_share for part in op.parts}) > 1
    ]
    assert nested
    for op in nested:
        assert sum(part.norm_share for part in op.parts) == 1
        assert sum(part.bias_share for part in op.parts) == pytest.approx(1)


def part(layer: int, channels: range, groups: range, norm: float, bias: float) -> LayerPart:
    """A part by ranges."""
    return LayerPart(
        layer=layer,
        channels=tuple(channels),
        kv_groups=tuple(groups),
        norm_share=norm,
        bias_share=bias,
    )


@pytest.mark.parametrize("lower", [True, False])
def test_a_layer_that_gives_everything_is_itself(family: str, lower: bool) -> None:
    """With shares 1 and 0 the result is that layer, bit by bit, but for the mean of the norms."""
    model = grouped(family)
    pair, sizes = list(model.model.layers)[2:4], DecoderView.of(model).dimensions()
    whole, nothing = (range(M), range(KV), 0.5, 1.0), (range(0), range(0), 0.5, 0.0)
    parts = [part(2, *(whole if lower else nothing)), part(3, *(nothing if lower else whole))]
    made = dict(concatenated_layer(parts, pair, sizes).named_parameters())
    one = pair[0 if lower else 1]
    for name, parameter in one.named_parameters():
        if "norm" in name:
            mean = (pair[0].get_parameter(name) + pair[1].get_parameter(name)) / 2
            torch.testing.assert_close(made[name], mean)
        else:
            assert torch.equal(made[name], parameter), name


def test_a_merged_mlp_adds_up_the_chosen_channels_of_both(family: str) -> None:
    """On one normalised input: the sum of what the chosen channels of each MLP give."""
    model = grouped(family)
    pair, sizes = list(model.model.layers)[:2], DecoderView.of(model).dimensions()
    parts = [part(0, range(5, 35), range(1), 0.5, 0.4), part(1, range(18), range(1, 4), 0.5, 0.6)]
    made = concatenated_layer(parts, pair, sizes)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    expected = torch.zeros(3, 32)
    with torch.no_grad():
        for given, layer in zip(parts, pair, strict=True):
            z = nn.functional.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x)
            chosen = list(given.channels)
            expected += z[:, chosen] @ layer.mlp.down_proj.weight[:, chosen].T
        torch.testing.assert_close(made.mlp(x), expected)


@pytest.mark.parametrize("name", ["qwen2", "phi3"])
def test_halves_of_equal_layers_are_that_layer(name: str) -> None:
    """In any order of the units, also where several projections are one matrix."""
    model = grouped(name)
    view = DecoderView.of(model)
    pair, sizes = list(view.layers)[:2], view.dimensions()
    pair[1].load_state_dict(pair[0].state_dict())
    channels, groups = sizes.intermediate_size, sizes.kv_heads
    halves = [
        part(0, range(channels // 2, channels), range(groups // 2, groups), 0.5, 0.5),
        part(1, range(channels // 2), range(groups // 2), 0.5, 0.5),
    ]
    made = concatenated_layer(halves, pair, sizes)
    (batch,) = capture(view, [random_tokens()])
    with torch.no_grad():
        found, expected = (
            run_layers([layer], batch.inputs[0], batch.arguments[0]) for layer in (made, pair[0])
        )
    torch.testing.assert_close(found, expected)


def test_twins_give_the_same_half_twice() -> None:
    """Two equal layers with equal influence: the weakness of choosing for each layer alone."""
    model = grouped(layers=2)
    model.model.layers[1].load_state_dict(model.model.layers[0].state_dict())
    scores = torch.tensor(sensitivity(model, 0)[0])
    half = best(scores.tolist(), M // 2)
    assert split(M, 0.5) == (24, 24) and sorted(top(scores, 24)) == half
    twins = [part(i, range(0), range(2 * i, 2 * i + 2), 0.5, 0.5) for i in (0, 1)]
    twins = [twin.model_copy(update={"channels": tuple(half)}) for twin in twins]
    pair, sizes = list(model.model.layers), DecoderView.of(model).dimensions()
    made = concatenated_layer(twins, pair, sizes)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        z = nn.functional.silu(pair[0].mlp.gate_proj(x)) * pair[0].mlp.up_proj(x)
        once = z[:, half] @ pair[0].mlp.down_proj.weight[:, half].T
        torch.testing.assert_close(made.mlp(x), 2 * once)


@pytest.mark.parametrize("units", [1, 2, 3, 4, 48, 11008])
@pytest.mark.parametrize("share", [0.0, 1e-9, 1 / 3, 0.4999, 0.5, 0.51, 0.75, 1.0])
def test_the_units_of_both_add_up(units: int, share: float) -> None:
    """Floors, and the rest goes to the larger share; none is none."""
    low, high = split(units, share)
    assert low + high == units and min(low, high) >= 0
    smaller = math.floor(units * min(share, 1 - share))
    assert (low if share < 0.5 else high) == smaller
    assert top(torch.arange(5.0), 0) == set()
    assert top(torch.tensor([1.0, 2.0, 2.0, 2.0]), 2) == {1, 2}


def test_a_second_merge_takes_from_the_parts_of_the_first() -> None:
    """Positions in the merged layer become channels and groups of the original layers."""
    parts = [
        part(4, range(10, 13), range(1, 2), 0.5, 0.75),
        part(5, range(7, 9), range(3, 4), 0.5, 0.25),
    ]
    low, high = narrowed(parts, {0, 2, 3}, {1}, 0.5)
    assert (low.channels, low.kv_groups) == ((10, 12), ())
    assert (high.channels, high.kv_groups) == ((7,), (3,))
    assert (low.norm_share, low.bias_share, high.bias_share) == (0.25, 0.375, 0.125)


def test_planted_identity_layers_merge_first() -> None:
    """Two layers that do nothing are nearest, share equally, and no logit changes."""
    model = grouped(layers=8)
    make_identity(model, [3, 4])
    before, session = logits(model), session_of(model)
    plan = planned("merge_concat", model, 1)
    (operation,) = plan.operations
    assert isinstance(operation, ConcatLayers)
    assert (operation.first, operation.last) == (3, 4)
    apply(plan, session)
    assert torch.equal(logits(model), before)


def test_a_pruned_model_survives_the_disk_and_the_cache(
    family: str, tmp_path: pytest.TempPathFactory
) -> None:
    """The plan is read again, stock classes load the result, and generation agrees."""
    model = grouped(family)
    session = session_of(model)
    before = session.fingerprint()
    plan = planned("merge_concat", model, 3)
    session.model_changed()
    assert session.fingerprint() == before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    file = tmp_path / "plan.json"  # type: ignore[operator]
    plan.write(file)
    assert PruningPlan.read(file) == plan
    apply(PruningPlan.read(file), session)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    torch.testing.assert_close(logits(loaded), logits(model))
    assert torch.equal(greedy(loaded, use_cache=True), greedy(loaded, use_cache=False))
    assert torch.equal(greedy(model, use_cache=True), greedy(loaded, use_cache=True))
    owners = [p.data_ptr() for p in model.parameters()]
    assert len(owners) == len(set(owners))
    for op in plan.operations:
        assert isinstance(op, ConcatLayers)
        homes = layer_mapping(plan)[op.first : op.last + 1]
        assert len(set(homes)) == 1
        rows = [row.cells[0].text for row in explain(plan).tables[0].rows]
        assert any("concatenate" in str(cell) and "KV groups" in str(cell) for cell in rows)


def test_a_plan_can_be_cut() -> None:
    """The first operations are a plan of their own."""
    model = grouped(layers=8)
    make_identity(model, [1, 2, 5, 6])
    session, plan = session_of(model), planned("merge_concat", model, 2)
    assert len(plan.operations) == 2
    apply(plan.upto(1), session)
    assert len(model.model.layers) == 7


def test_layers_of_different_kinds_never_merge() -> None:
    """Each run of layers of one kind keeps one at least, and more is refused."""
    kinds = ["full_attention", "sliding_attention"] * 2 + ["sliding_attention"] * 2
    model = make_model("qwen2", layer_types=kinds, sliding_window=4, use_sliding_window=True)
    plan = planned("merge_concat", model, 2)
    (operation,) = plan.operations
    assert isinstance(operation, ConcatLayers)
    assert (operation.first, operation.last) == (3, 5)
    with pytest.raises(TargetError, match="different kinds, which never merge, at most 2 of 6"):
        planned("merge_concat", model, 3)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ([(range(20), range(1)), (range(27), range(1, 4))], "give 47 MLP channels to one layer"),
        ([(range(24), range(2)), (range(24), range(3))], "give 5 KV groups to one layer"),
        ([(range(24), range(2)), (range(30, 54), range(2))], "MLP channels of layer 2, all below"),
        ([(range(24), range(2)), (range(24), range(3, 5))], "KV groups of layer 2, all below 4"),
    ],
)
def test_parts_that_do_not_make_a_layer_are_refused(
    parts: list[tuple[range, range]], words: str
) -> None:
    """Before anything changes, with the layer named."""
    model = grouped()
    session = session_of(model)
    plan = planned("merge_concat", model, 1)
    given = tuple(part(i, *units, 0.5, 0.5) for i, units in enumerate(parts, 1))
    with pytest.raises(PlanError, match=words):
        apply(plan.model_copy(update={"operations": (ConcatLayers(parts=given),)}), session)
    assert len(model.model.layers) == 6
    with pytest.raises(ValueError, match="consecutive layers"):
        ConcatLayers(parts=given[::-1])


def test_nan_and_too_much_are_refused() -> None:
    """NaN neither wins nor loses, and one layer stays."""
    model = grouped()
    with pytest.raises(TargetError, match="at most 5 can be removed"):
        planned("merge_concat", model, 6)
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(NumericalError):
        planned("merge_concat", model, 1)


def test_sensitivities_of_half_precision_are_summed_in_wide_numbers() -> None:
    """What the layer computes is rounded, the sums over tokens and weights are not."""
    model = grouped().to(torch.bfloat16)
    layer, heard = model.model.layers[2], dict[str, Tensor]()
    hooks = [
        linear.register_forward_hook(lambda _m, args, _out, key=key: heard.update({key: args[0]}))
        for key, linear in (("down", layer.mlp.down_proj), ("out", layer.self_attn.o_proj))
    ]

    def run() -> None:
        with torch.no_grad():
            model(TOKENS)

    channels, groups = sensitivities(layer, run, DecoderView.of(model).dimensions())
    for hook in hooks:
        hook.remove()
    found = {"down": channels, "out": groups}
    for key, linear in (("down", layer.mlp.down_proj), ("out", layer.self_attn.o_proj)):
        activity = heard[key].double().abs().flatten(0, 1).mean(0)
        columns = activity * linear.weight.detach().double().abs().sum(0)
        if key == "out":
            # Columns of query heads 2k and 2k + 1 belong to KV head k.
            columns = columns.view(KV, G * D).mean(-1)
        torch.testing.assert_close(found[key], columns, rtol=1e-12, atol=0)
