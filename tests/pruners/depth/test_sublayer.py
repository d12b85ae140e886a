"""Dropping neighbouring blocks against brute force over block sequences, and what may not go."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from slm_plugin.errors import NumericalError, PlanError, TargetError
from slm_plugin.models.families.llama import LLAMA
from slm_plugin.plans import DropLayers, DropSublayers, PruningPlan, layout
from slm_plugin.pruners.depth.sublayer import Sublayer, SublayerOptions, steps
from slm_plugin.report.explain import explain
from slm_plugin.report.plan_effects import final_trials, layer_mapping
from slm_plugin.session import apply
from slm_plugin.surgery.layers import apply_layers
from slm_plugin.target import Target
from tests.pruners.depth.strategies import TOKENS, greedy, own_text, planned, session_of
from tests.tiny import make_model

# Blocks of a decoder in their order: "A" or "M", and the layer.
Blocks = list[tuple[str, int]]


@torch.no_grad()
def logits_of(model: PreTrainedModel, blocks: Blocks, tokens: Tensor = TOKENS) -> Tensor:
    """The residual stream written out, block by block; no layer's own forward is called."""
    inner = model.model
    hidden = inner.embed_tokens(tokens)
    places = inner.rotary_emb(hidden, torch.arange(tokens.shape[1])[None])
    for kind, index in blocks:
        layer = inner.layers[index]
        if kind == "A":
            given = layer.input_layernorm(hidden)
            hidden = hidden + layer.self_attn(given, places, None)[0]
        else:
            hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    logits: Tensor = model.lm_head(inner.norm(hidden))
    return logits


def loss_of(model: PreTrainedModel, blocks: Blocks, tokens: Tensor = TOKENS) -> float:
    """Next-token cross entropy of the model with these blocks."""
    logits = logits_of(model, blocks, tokens).double()
    return float(nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()))


def all_blocks(layers: int) -> Blocks:
    """The whole decoder."""
    return [(kind, index) for index in range(layers) for kind in "AM"]


def brute_force(model: PreTrainedModel, wanted: int) -> tuple[list[Blocks], list[float]]:
    """The greedy search: the pairs that go, and how much the loss has then grown."""
    blocks = all_blocks(len(model.model.layers))
    whole = loss_of(model, blocks)
    removed, losses = [], []
    for _ in range(wanted):
        found = [loss_of(model, blocks[:at] + blocks[at + 2 :]) for at in range(len(blocks) - 1)]
        at = found.index(min(found))
        removed.append(blocks[at : at + 2])
        losses.append(found[at] - whole)
        del blocks[at : at + 2]
    return removed, losses


def dropped(plan: PruningPlan) -> list[Blocks]:
    """What the operations of a plan drop, in order."""
    found = []
    for op in plan.operations:
        assert isinstance(op, DropSublayers)
        blocks = [("A", i) for i in op.attention] + [("M", i) for i in op.mlp]
        found.append(sorted(blocks, key=lambda block: (block[1], block[0])))
    return found


def left(plan: PruningPlan) -> Blocks:
    """Blocks that a plan leaves."""
    removed = [block for pair in dropped(plan) for block in pair]
    return [block for block in all_blocks(plan.before.layers) if block not in removed]


def disable(model: PreTrainedModel, blocks: Blocks) -> None:
    """Make blocks add nothing."""
    with torch.no_grad():
        for kind, index in blocks:
            layer = model.model.layers[index]
            linear = layer.self_attn.o_proj if kind == "A" else layer.mlp.down_proj
            linear.weight.zero_()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_the_greedy_search_of_brute_force(family: str, seed: int) -> None:
    """Same blocks in the same order, same losses, and the applied model is those blocks."""
    model = make_model(family, seed=seed)
    expected, losses = brute_force(model, 5)
    session = session_of(model)
    plan = planned("sublayer", model, 5)
    assert dropped(plan) == expected
    assert [-trial.similarity for trial in plan.trials] == pytest.approx(losses, abs=2e-5)
    logits = logits_of(model, left(plan))
    apply(plan, session)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, logits, atol=1e-5, rtol=1e-4)


def test_brute_force_has_both_kinds_of_pairs() -> None:
    """Whole layers and joints go, and layers that were joined before, or the test says little."""
    kinds = set()
    for seed in (0, 1, 2):
        for low, high in brute_force(make_model(seed=seed), 5)[0]:
            kinds.add((low[0], low[1] == high[1]))
    assert ("M", False) in kinds and {("A", True), ("A", False)} & kinds


def test_both_blocks_of_a_layer_are_the_layer(family: str) -> None:
    """Dropping attention and MLP of layers is dropping the layers themselves."""
    by_blocks, by_layers = make_model(family), make_model(family)
    kept = [layer for i, layer in enumerate(by_blocks.model.layers) if i not in (1, 4)]
    apply_layers(by_blocks, [DropSublayers(attention=(1, 4), mlp=(1, 4))])
    apply_layers(by_layers, [DropLayers(indices=(1, 4))])
    assert list(by_blocks.model.layers) == kept
    with torch.no_grad():
        assert torch.equal(by_blocks(TOKENS).logits, by_layers(TOKENS).logits)


@pytest.mark.parametrize("planted", [[("M", 3), ("A", 4)], [("A", 2), ("M", 2)]])
def test_blocks_that_do_nothing_go_first(family: str, planted: Blocks) -> None:
    """Two idle neighbours are found inside a layer or across two, and no logit changes."""
    model = make_model(family, num_hidden_layers=7)
    disable(model, planted)
    tokens = own_text(model)
    with torch.no_grad():
        before = model(TOKENS).logits
    session = session_of(model)
    plan = planned("sublayer", model, 1, tokens=tokens)
    assert dropped(plan) == [planted]
    apply(plan, session)
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, before)


def test_a_layer_has_no_block_but_these(family: str) -> None:
    """Each architecture has one norm a block, so nothing is left behind or taken along."""
    names = {name for name, _ in make_model(family).model.layers[0].named_children()}
    assert names == {"self_attn", "input_layernorm", *LLAMA.mlp}


def test_a_pruned_model_survives_the_disk_and_the_cache(family: str, tmp_path: Path) -> None:
    """Stock reload gives the same logits; greedy tokens agree with and without KV cache."""
    model = make_model(family)
    session = session_of(model)
    operations = (
        DropSublayers(attention=(2,), mlp=(1,)),
        DropSublayers(attention=(3,), mlp=(2,)),
        DropSublayers(attention=(5,), mlp=(5,)),
    )
    plan = planned("sublayer", model, 3).model_copy(update={"operations": operations})
    expected = logits_of(model, left(plan))
    plan.write(tmp_path / "plan.json")
    assert PruningPlan.read(tmp_path / "plan.json") == plan
    apply(plan, session)
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, expected, atol=1e-5, rtol=1e-4)
    assert torch.equal(greedy(loaded, use_cache=True), greedy(loaded, use_cache=False))
    owners = [p.data_ptr() for p in model.parameters()]
    assert len(owners) == len(set(owners))


def test_a_layer_attends_as_its_attention_did(tmp_path: Path) -> None:
    """layer_types keeps the entry of the layer whose attention is left."""
    kinds = ["full_attention"] * 2 + ["sliding_attention"] * 4
    model = make_model(
        "qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=2, layer_types=kinds
    )
    apply_layers(model, [DropSublayers(attention=(2,), mlp=(1,))])
    assert model.config.layer_types == ["full_attention"] * 2 + ["sliding_attention"] * 3
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(
    ("attention", "mlp", "words"),
    [
        ((3,), (1,), "the attention of layer 2 would come after that of layer 1"),
        ((1,), (2,), "the MLP of layer 1 would come after that of layer 0"),
        ((0,), (5,), "the MLP of layer 0 would come first"),
        ((6,), (5,), "names layer 6"),
        ((2, 2), (1, 2), "uses the attention of layer 2 twice"),
        (tuple(range(6)), tuple(range(6)), "removes every layer"),
    ],
)
def test_what_is_no_sequence_of_layers_is_refused(
    attention: tuple[int, ...], mlp: tuple[int, ...], words: str
) -> None:
    """Nothing changes, and the block is named."""
    model = make_model()
    layers = list(model.model.layers)
    with pytest.raises(PlanError, match=words):
        apply_layers(model, [DropSublayers(attention=attention, mlp=mlp)])
    assert list(model.model.layers) == layers and model.config.num_hidden_layers == 6


def test_more_of_one_kind_is_refused() -> None:
    """As many attention as MLP blocks are dropped."""
    with pytest.raises(ValueError, match="as many of both"):
        DropSublayers(attention=(1, 2), mlp=(1,))


def test_blocks_and_whole_layers_go_in_one_plan() -> None:
    """Layers 1 and 2 become one, and layer 4 is dropped: the blocks that remain, in order."""
    model = make_model()
    blocks: Blocks = [
        ("A", 0),
        ("M", 0),
        ("A", 1),
        ("M", 2),
        ("A", 3),
        ("M", 3),
        ("A", 5),
        ("M", 5),
    ]
    wanted = logits_of(model, blocks)
    dropped = [DropLayers(indices=(4,)), DropSublayers(attention=(2,), mlp=(1,))]
    assert apply_layers(model, dropped) == [(0, 0), (1, 2), (3, 3), (5, 5)]
    with torch.no_grad():
        assert torch.equal(model(TOKENS).logits, wanted)


def test_every_neighbouring_pair_is_a_step_and_leaves_layers() -> None:
    """2n - 1 of them, and what each leaves is what surgery makes of its operation."""
    found = list(steps(tuple((i, i) for i in range(5)), range(5)))
    assert len({step.dropped for step in found}) == 9
    for step in found:
        assert layout.layers_left([step.dropped], 5) == list(step.left)
    joined = ((0, 1), (3, 3), (4, 4))
    assert [(s.first, s.last) for s in steps(joined, range(5))] == [
        (0, 1),
        (0, 3),
        (3, 3),
        (3, 4),
        (4, 4),
    ]


def test_protected_layers_keep_both_blocks() -> None:
    """Idle blocks at the ends stay, and more than the rest is refused."""
    model = make_model(num_hidden_layers=7)
    disable(model, [("A", 0), ("M", 0), ("A", 1), ("M", 6), ("A", 6)])
    ends = {"protect_first": 2, "protect_last": 1}
    for wanted in (1, 2, 4):
        plan = planned("sublayer", model, wanted, **ends)
        assert plan.layers_removed == wanted
        assert {index for pair in dropped(plan) for _, index in pair} <= {2, 3, 4, 5}
    with pytest.raises(TargetError, match="protect_first 2 and protect_last 1 at most 4 of 7"):
        planned("sublayer", model, 5, **ends)
    with pytest.raises(TargetError, match="at most 6 can be removed"):
        planned("sublayer", model, 7)


def test_ratio_means_whole_layers() -> None:
    """2.4 layers' worth of parameters are two layers' worth of blocks."""
    session = session_of(make_model())
    share = session.original.layer_parameters / session.original.parameters
    plan = planned("sublayer", make_model(), Target(ratio=2.4 * share))
    assert plan.parameters_removed == 2 * session.original.layer_parameters


def test_reports_know_where_blocks_went() -> None:
    """Every step is final, and a cut plan explains itself."""
    plan = planned("sublayer", make_model(), 5)
    # Of n layers' 2n - 1 neighbours one pair is the step itself.
    assert len(plan.explored) == 10 + 8 + 6 + 4 + 2
    assert final_trials(plan) == set(range(5))
    operations = (
        DropSublayers(attention=(2,), mlp=(1,)),
        DropSublayers(attention=(4,), mlp=(4,)),
    )
    edited = plan.model_copy(update={"operations": operations})
    assert layer_mapping(edited) == [0, 1, 1, 2, None, 3]
    rows = [row.cells[0].text for row in explain(edited).tables[0].rows]
    assert rows == ["drop attention 2, MLP 1", "drop attention 4, MLP 4"]
    cut = plan.upto(2)
    model = make_model()
    apply(cut, session_of(model))
    assert len(model.model.layers) == 4


def test_planning_leaves_the_model_and_a_killed_search_goes_on(tmp_path: Path) -> None:
    """No bit changes, and trials come back from the journal."""
    model = make_model()
    session = session_of(model, journals=tmp_path)
    before = session.fingerprint()
    plan = planned("sublayer", model, 3)
    session.model_changed()
    assert session.fingerprint() == before
    found = {
        session.plan(Sublayer(SublayerOptions(), Target(layers_removed=3))).to_json()
        for _ in range(2)
    }
    assert found == {plan.to_json()}
    (file,) = tmp_path.glob("*.jsonl")
    lines = file.read_text().splitlines(keepends=True)
    assert len(lines) == len(set(lines))


def test_nan_is_refused() -> None:
    """NaN neither wins nor loses a comparison."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(NumericalError):
        planned("sublayer", model, 1)


def test_of_equal_pairs_the_lowest_goes() -> None:
    """Three pairs that do nothing: two inside layers, one across two of them."""
    model = make_model(num_hidden_layers=9)
    idle: list[Blocks] = [
        [("A", 1), ("M", 1)], [("M", 3), ("A", 4)], [("A", 6), ("M", 6)]
    ]  # fmt: skip
    for pair in idle:
        disable(model, pair)
    plan = planned("sublayer", model, 3, tokens=own_text(model))
    assert dropped(plan) == idle
    assert [trial.similarity for trial in plan.trials] == [0, 0, 0]
