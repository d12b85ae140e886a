"""Importance of experts, by what the router gives to them or by Taylor expansion."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from slm_plugin.lazy import inference_mode, nn, torch
from slm_plugin.models.view import DecoderView, Experts, experts_of
from slm_plugin.plans import UnitScores
from slm_plugin.pruners.gradients import loss_gradients
from slm_plugin.pruners.width.importance import rounded

if TYPE_CHECKING:
    from torch import Tensor


@inference_mode
def routed_mass(view: DecoderView, batches: Iterable[Tensor]) -> tuple[UnitScores, ...]:
    """Score experts by the sum, over all tokens, of the weight that the router gives to them.

    The weight is the factor of the expert's output in the sum that leaves the block; it is 0 for
    a token that does not choose the expert. How much an expert's output differs from that of the
    others is ignored.

    Args:
        view: The model, a mixture in evaluation mode.
        batches: Calibration token ids, each ``(samples, length)``.

    Returns:
        For every layer, one number per expert.

    Raises:
        NumericalError: A score is NaN or infinite.

    Source: statistics of the router as the importance of experts: Li et al. 2023, MC-SMoE (arXiv
        2310.01334), by how often an expert is chosen; here each choice counts by its weight. Lu
        et al. 2024, "Not All Experts are Equal" (arXiv 2402.14800), remove whole experts from
        decoders as well, but choose them by the error of the layer's output.
    """
    experts = _experts(view)
    sums = [torch.zeros(one.count, dtype=torch.float64) for one in experts]
    chosen = int(view.config.num_experts_per_tok)
    # Mixtral divides by the sum always and has no switch for it.
    normalised = bool(getattr(view.config, "norm_topk_prob", True))

    def listener(total: Tensor) -> Callable[..., None]:
        def listen(module: nn.Module, given: Any, output: Any) -> None:
            total.add_(given_weights(output, len(total), chosen, normalised).cpu())

        return listen

    hooks = [
        one.router.register_forward_hook(listener(total))
        for one, total in zip(experts, sums, strict=True)
    ]
    try:
        for tokens in batches:
            view.decoder(**view.inputs(tokens))
    finally:
        for hook in hooks:
            hook.remove()
    return _scores(sums)


def given_weights(output: Any, experts: int, chosen: int, normalised: bool) -> Tensor:
    """What each expert gets of some tokens, summed over them.

    Args:
        output: What the router puts out. Of a linear map: logits, ``(tokens, experts)``. Of a
            router class: a tuple whose last two are the weights, ``(tokens, chosen)`` or
            ``(tokens, experts)`` by class, and the experts that they are for,
            ``(tokens, chosen)``.
        experts: Number of experts.
        chosen: Number of experts that each token chooses.
        normalised: The chosen probabilities are divided by their sum, where the output is logits.

    Returns:
        ``(experts,)``, float64.
    """
    if isinstance(output, torch.Tensor):
        probabilities = torch.softmax(output.float(), dim=-1)
        weights, indices = torch.topk(probabilities, chosen, dim=-1)
        if normalised:
            weights = weights / weights.sum(dim=-1, keepdim=True)
    else:
        *_, weights, indices = output
        if weights.shape != indices.shape:
            weights = weights.gather(-1, indices)
    total = torch.zeros(experts, dtype=torch.float64, device=weights.device)
    return total.index_add_(0, indices.flatten(), weights.flatten().double())


def taylor(view: DecoderView, batches: Iterable[Tensor]) -> tuple[UnitScores, ...]:
    """Score experts by the sum of ``|w * dL/dw|`` over all weights of an expert, without biases.

    Args:
        view: The model, a mixture in evaluation mode.
        batches: Calibration token ids, each ``(samples, length)``.

    Returns:
        For every layer, one number per expert.

    Raises:
        NumericalError: The loss or a score is NaN or infinite.

    Source: Ma et al. 2023, LLM-Pruner (arXiv 2305.11627), section 3.2, element-wise importance
        of first order, with an expert as the group.
    """
    experts = _experts(view)
    by_layer = {id(layer): one for layer, one in zip(view.layers, experts, strict=True)}
    gradients = loss_gradients(view, batches, lambda layer: _weights(by_layer[id(layer)]))
    return _scores(
        _salience(one, gradient) for one, gradient in zip(experts, gradients, strict=True)
    )


def _experts(view: DecoderView) -> list[Experts]:
    found = (experts_of(layer, view.family) for layer in view.layers)
    return [one for one in found if one is not None]


def _weights(experts: Experts) -> dict[str, Tensor]:
    """Weights of all experts: of one each, named ``<number>.<path>``, or of all in one tensor."""
    named = experts.experts.named_parameters()
    return {name: weight for name, weight in named if not name.endswith("bias")}


def _salience(experts: Experts, gradients: dict[str, Tensor]) -> Tensor:
    """Sum over the weights of each expert, ``(experts,)``, float64."""
    total = torch.zeros(experts.count, dtype=torch.float64)
    for name, weight in _weights(experts).items():
        terms = (weight.detach() * gradients[name]).abs().double()
        if isinstance(experts.experts, nn.ModuleList):
            total[int(name.partition(".")[0])] += terms.sum().cpu()
        else:
            total += terms.flatten(1).sum(1).cpu()
    return total


def _scores(totals: Iterable[Tensor]) -> tuple[UnitScores, ...]:
    return tuple(
        UnitScores(layer=layer, unit="expert", scores=rounded(total, layer))
        for layer, total in enumerate(totals)
    )
