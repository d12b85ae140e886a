"""The three scores of Shortened LLaMA against their definitions, and its keep-list."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import PreTrainedModel

from slm_plugin.errors import NumericalError, TargetError
from slm_plugin.models.view import DecoderView, layer_weights
from slm_plugin.plans import DropLayers, PruningPlan
from slm_plugin.pruners.depth.shortened import magnitudes, taylor
from slm_plugin.pruners.gradients import loss_gradients
from slm_plugin.surgery.layers import apply_layers
from tests.pruners.depth.strategies import TOKENS, mean_loss, planned, removed
from tests.tiny import make_model


def scores(plan: PruningPlan) -> tuple[float, ...]:
    """The scores that a plan holds."""
    assert plan.layer_scores is not None
    return plan.layer_scores.scores


def vanish(model: PreTrainedModel, layer: int) -> None:
    """Set every weight of a layer to zero, biases too."""
    with torch.no_grad():
        for parameter in model.model.layers[layer].parameters():
            parameter.zero_()


def test_the_loss_score_is_that_of_manual_deletion(family: str) -> None:
    """Each layer taken from the whole model by surgery, one at a time."""
    expected = []
    for layer in range(6):
        model = make_model(family)
        apply_layers(model, [DropLayers(indices=(layer,))])
        expected.append(mean_loss(model) - mean_loss(make_model(family)))
    plan = planned("shortened", make_model(family), 5, keep_list=False)
    assert scores(plan) == pytest.approx(expected, abs=2e-5)
    assert removed(plan) == sorted(range(6), key=lambda layer: expected[layer])[:5]


def test_the_taylor_score_is_that_of_one_backward_pass(family: str) -> None:
    """All samples at once, every weight of the layer but no bias, in plain autograd."""
    model = make_model(family)
    logits = model(TOKENS).logits
    torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), TOKENS[:, 1:].flatten()
    ).backward()
    expected = [
        sum(
            (p.detach() * p.grad).abs().sum().item()
            for name, p in layer.named_parameters()
            if not name.endswith("bias")
        )
        for layer in model.model.layers
    ]
    plan = planned("shortened", make_model(family), 2, score="taylor", keep_list=False)
    assert scores(plan) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", ["self_attn.v_proj", "mlp.up_proj", "input_layernorm"])
def test_one_weight_counts_as_much_as_finite_differences_say(name: str) -> None:
    """|w dL/dw| of the weight that counts most is what the loss does when that weight is scaled."""
    model = make_model(num_hidden_layers=2)
    weight = model.model.layers[1].get_submodule(name).weight
    gradients = loss_gradients(DecoderView.of(model), [TOKENS], layer_weights)
    shares = (weight.detach() * gradients[1][f"{name}.weight"]).abs()
    place = tuple(torch.unravel_index(shares.argmax(), shares.shape))
    original = weight.detach()[place].item()
    losses = []
    with torch.no_grad():
        for scale in (1.02, 0.98):
            weight[place] = original * scale
            losses.append(mean_loss(model))
    assert shares[place].item() == pytest.approx(abs(losses[0] - losses[1]) / 0.04, rel=1e-2)


def test_gradients_of_samples_may_cancel() -> None:
    """The absolute value is taken once, after the sum over all samples and batches."""
    view = DecoderView.of(make_model())
    whole = taylor(view, [TOKENS])
    assert taylor(view, TOKENS.split(2)) == pytest.approx(whole, rel=1e-5)
    each = [taylor(view, [sample]) for sample in TOKENS.split(1)]
    for layer, total in enumerate(whole):
        assert total < sum(one[layer] for one in each) / len(TOKENS)


@pytest.mark.parametrize("factor", [2.0, -3.0])
def test_magnitude_grows_with_the_weights(family: str, factor: float) -> None:
    """A layer scaled by c scores |c| times as much, and the others stay."""
    model = make_model(family)
    before = magnitudes(DecoderView.of(model))
    scaled = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in scaled.model.layers[2].parameters():
            parameter.mul_(factor)
    after = magnitudes(DecoderView.of(scaled))
    assert after[2] == pytest.approx(abs(factor) * before[2], rel=1e-6)
    assert after[:2] + after[3:] == before[:2] + before[3:]


def test_magnitude_is_the_sum_of_all_weights_but_biases() -> None:
    """Norm gains count, biases do not, and half precision loses nothing of the sum."""
    model = make_model("qwen2")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1000.0 if name.endswith("bias") else 0.5)
    weights = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 48 + 2 * 32
    for dtype in (torch.float32, torch.float16):
        assert magnitudes(DecoderView.of(model.to(dtype))) == [0.5 * weights] * 6


@pytest.mark.parametrize("score", ["taylor", "magnitude"])
def test_layers_of_zeros_go_first(family: str, score: str) -> None:
    """They score 0; of the two the lower goes first."""
    model = make_model(family)
    vanish(model, 4)
    vanish(model, 1)
    plan = planned("shortened", model, 2, score=score, keep_list=False)
    assert removed(plan) == [1, 4]
    assert [scores(plan)[layer] for layer in (1, 4)] == [0, 0]


@pytest.mark.parametrize("score", ["loss", "taylor", "magnitude"])
def test_the_keep_list_is_honoured(score: str) -> None:
    """Worthless layers on it stay, and more than the rest is refused with the reason."""
    model = make_model(num_hidden_layers=9)
    for layer in (0, 1, 2, 3, 7, 8):
        vanish(model, layer)
    assert set(removed(planned("shortened", model, 3, score=score))) == {4, 5, 6}
    with pytest.raises(TargetError, match=r"keep_list .* at most 3 of 9 can be removed"):
        planned("shortened", model, 4, score=score)
    free = planned("shortened", model, 4, score=score, keep_list=False)
    assert len(removed(free)) == 4


def test_a_model_that_the_keep_list_covers_is_refused() -> None:
    """Six layers are all on the list."""
    with pytest.raises(TargetError, match="at most 0 of 6"):
        planned("shortened", make_model(), 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_magnitude_that_is_no_number_is_refused(bad: float) -> None:
    """No forward pass would tell, and neither may it win or lose a comparison."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[1, 1] = bad
    with pytest.raises(NumericalError, match="score of layer 2"):
        planned("shortened", model, 1, score="magnitude", keep_list=False)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_magnitudes_of_half_precision_are_summed_in_wide_numbers(dtype: torch.dtype) -> None:
    """Sums that the format would round away, or that overflow it, are those of float64."""
    model = make_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(2000)
    model.to(dtype)
    expected = [
        sum(p.detach().double().abs().sum().item() for p in layer.parameters())
        for layer in model.model.layers
    ]
    assert expected[1] > torch.finfo(torch.float16).max
    assert magnitudes(DecoderView.of(model)) == pytest.approx(expected, rel=1e-12)
