"""Tests of slm_plugin.surgery.experts: experts and the router's rows go together."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from slm_plugin.errors import PlanError
from slm_plugin.models.view import DecoderView, experts_of
from slm_plugin.plans import DropLayers, KeepChannels, KeepExperts
from slm_plugin.surgery import apply_operations
from slm_plugin.surgery.channels import apply_channels
from tests.models.families.test_matrix import generated, logits, reloaded
from tests.tiny import make_model

LAYERS, EXPERTS = 3, 6
# Which experts stay, in each layer others.
KEPT = ((0, 2, 3, 5), (1, 2, 3, 4), (0, 1, 4, 5))
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("mixtral", {"num_local_experts": EXPERTS}),
    "qwen2_moe": ("qwen2_moe", {"num_experts": EXPERTS}),
    "qwen2_moe_normalised": ("qwen2_moe", {"num_experts": EXPERTS, "norm_topk_prob": True}),
    "qwen3_moe": ("qwen3_moe", {"num_experts": EXPERTS, "norm_topk_prob": False}),
    "qwen3_moe_normalised": ("qwen3_moe", {"num_experts": EXPERTS, "norm_topk_prob": True}),
    "gpt_oss": ("gpt_oss", {"num_local_experts": EXPERTS}),
}


@pytest.fixture(params=sorted(MIXTURES))
def mixture(request: pytest.FixtureRequest) -> str:
    """Every family of mixtures, by both ways to weigh the chosen experts."""
    return str(request.param)


def make(mixture: str, **settings: Any) -> PreTrainedModel:
    """A tiny mixture of three layers."""
    family, own = MIXTURES[mixture]
    return make_model(family, num_hidden_layers=LAYERS, **{**own, **settings})


def keep(kept: tuple[tuple[int, ...], ...] = KEPT) -> list[KeepExperts]:
    """The operations on all layers."""
    return [KeepExperts(layer=layer, experts=experts) for layer, experts in enumerate(kept)]


def routers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """What chooses experts, a module per layer."""
    found = (experts_of(layer, DecoderView.of(model).family) for layer in model.model.layers)
    return [one.router for one in found if one is not None]


@contextmanager
def never_chosen(model: PreTrainedModel, kept: tuple[tuple[int, ...], ...]) -> Iterator[None]:
    """The router's logits of all other experts are minus infinity, in every release alike."""
    kept_by_weight = {
        id(router.weight): list(stay) for router, stay in zip(routers(model), kept, strict=True)
    }
    linear = functional.linear

    def masked(given: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        found = linear(given, weight, *rest)
        if id(weight) not in kept_by_weight:
            return found
        mask = torch.full_like(found, -torch.inf)
        mask[..., kept_by_weight[id(weight)]] = 0
        return found + mask

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "linear", masked)
        yield


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_removal_is_never_choosing(mixture: str, dtype: torch.dtype) -> None:
    """Logits are those of the whole model whose router cannot choose the removed experts."""
    model = make(mixture).to(dtype)
    exact = dtype == torch.float64
    # What transformers 5 takes instead for speed knows no float64.
    if exact and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    whole = logits(model)
    with never_chosen(model, KEPT):
        expected = logits(model)
    assert not torch.allclose(expected, whole, atol=1e-3)
    apply_channels(model, keep())
    assert torch.allclose(logits(model), expected, atol=1e-9 if exact else 1e-5, rtol=0)


def test_dimensions_are_as_promised(mixture: str) -> None:
    """Predicted from the plan, counted on the modules, and counted by hand."""
    model = make(mixture)
    before = DecoderView.of(model).dimensions()
    assert (before.experts, before.experts_per_token) == (EXPERTS, 2)
    apply_channels(model, keep())
    after = DecoderView.of(model).dimensions()
    assert after == before.without_units(experts=2)
    width, hidden = before.intermediate_size, before.hidden_size
    # gpt-oss has biases of gate, up, down and of the router.
    biases = 2 * width + hidden + 1 if mixture == "gpt_oss" else 0
    assert before.expert_parameters == 3 * width * hidden + hidden + biases
    removed = sum(p.numel() for p in make(mixture).parameters()) - after.parameters
    assert removed == LAYERS * 2 * before.expert_parameters


@pytest.mark.parametrize("kept", [KEPT, ((4, 1), (0, 5), (3, 2))])
def test_the_stock_class_reads_the_result(
    mixture: str, kept: tuple[tuple[int, ...], ...], tmp_path: Path
) -> None:
    """With equal logits, a config that states the number, and as many experts as one token has."""
    model = make(mixture)
    apply_channels(model, keep(kept))
    model.save_pretrained(tmp_path)
    stock = reloaded(tmp_path, model)
    assert torch.equal(logits(stock), logits(model))
    assert generated(model, use_cache=True) == generated(model, use_cache=False)
    assert generated(stock, use_cache=True) == generated(model, use_cache=True)
    assert DecoderView.of(stock).dimensions() == DecoderView.of(model).dimensions()


def test_every_module_states_what_a_new_one_would(mixture: str) -> None:
    """Public attributes of all modules are those of the class built from the new config."""
    model = make(mixture)
    apply_channels(model, keep())
    fresh = type(model)(model.config).eval()
    plain = (bool, int, float, str)
    built = dict(fresh.named_modules())
    assert dict(model.named_modules()).keys() == built.keys()
    for name, module in model.named_modules():
        found, wanted = (
            {k: v for k, v in vars(one).items() if isinstance(v, plain) and k[0] != "_"}
            for one in (module, built[name])
        )
        assert found == wanted, name
    shapes = {name: p.shape for name, p in fresh.named_parameters()}
    assert {name: p.shape for name, p in model.named_parameters()} == shapes


def test_the_balance_of_the_load_can_still_be_trained(mixture: str) -> None:
    """The auxiliary loss, which counts experts, is that of the new number."""
    model = make(mixture)
    apply_channels(model, keep())
    tokens = torch.arange(3, 27).view(2, 12)
    found = model(input_ids=tokens, labels=tokens, output_router_logits=True, use_cache=False)
    assert torch.isfinite(found.loss.detach())
    # As many as a token has when all are used alike.
    assert 1 < float(found.aux_loss.detach()) < 4


def test_the_shared_expert_stays(mixture: str) -> None:
    """What every token has is not touched, nor is anything but experts and routers."""
    model = make(mixture)
    before = copy.deepcopy(model)
    apply_channels(model, keep())
    former = dict(before.named_parameters())
    own = (".experts.", ".gate.", ".router.")
    others = [n for n in former if not any(part in n for part in own)]
    assert any("shared_expert" in name for name in others) == mixture.startswith("qwen2")
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], former[name]) for name in others)


def test_frozen_weights_stay_frozen(mixture: str) -> None:
    """And a model in training mode stays in it."""
    model = make(mixture).train()
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 2 == 0)
    flags = {
        name: p.requires_grad
        for name, p in model.named_parameters()
        if not name.rpartition("experts.")[2][:1].isdigit()
    }
    apply_channels(model, keep())
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: after[name] for name in flags} == flags
    assert all(module.training for module in model.modules())


def test_both_names_in_a_config_are_kept_equal() -> None:
    """A checkpoint of transformers 5 states the number of Qwen3-MoE's experts under either name."""
    model = make("qwen3_moe")
    model.config.num_local_experts = EXPERTS
    apply_channels(model, keep())
    assert model.config.num_experts == model.config.num_local_experts == 4


def test_torch_pruning_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts are rows; the extra is for channels and heads."""
    monkeypatch.setattr("slm_plugin.extras.missing", lambda extra: ("torch-pruning",))
    apply_channels(make("mixtral"), keep())


@pytest.mark.parametrize(
    ("operations", "message"),
    [
        (
            keep(((0,), (1,), (2,))),
            "keep_experts of layer 0: experts: keeps 1 experts; the router chooses 2 for each",
        ),
        (keep(((0, 1), (1, 2, 3), (2, 3))), "keep_experts keeps 2 units in one layer and 3"),
        (keep(KEPT[:2]), "keep_experts names layer 2 0 times"),
        (keep(((0, 6), (0, 1), (0, 1))), "keep_experts of layer 0: experts: names expert 6"),
        (keep(((0, 1, 1), (0, 1, 2), (0, 1, 2))), "names expert 1 twice"),
        (
            [KeepChannels(layer=i, indices=(0, 1)) for i in range(LAYERS)],
            "no channel of .* can be removed alone",
        ),
        ([*keep(), DropLayers(indices=(0,))], "mixes depth and width"),
    ],
)
def test_wrong_operations_change_nothing(operations: list[Any], message: str) -> None:
    """They are refused before the first weight changes."""
    pytest.importorskip("torch_pruning")
    model = make("qwen3_moe")
    before = logits(model)
    with pytest.raises(PlanError, match=message) as caught:
        apply_operations(model, operations)
    assert "\n" not in str(caught.value)
    assert torch.equal(logits(model), before)


def test_models_without_experts_have_none_to_remove() -> None:
    """A hand-made plan for another family is refused by name."""
    with pytest.raises(PlanError, match="no expert of LlamaForCausalLM can be removed alone"):
        apply_channels(
            make_model(num_hidden_layers=2),
            [KeepExperts(layer=i, experts=(0, 1)) for i in range(2)],
        )
