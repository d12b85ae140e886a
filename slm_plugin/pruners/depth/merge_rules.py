"""How a run of layers becomes one: the merge rules, each a formula over one projection.

Only the weights of the seven projections are merged. Everything else of the merged layer (norm
gains, biases, q/k norms) is the lowest layer's, as in the released SLM code, except under
``keep_high``, which takes the top layer whole.

Source: SLM (arXiv 2502.19159) and its released code; RDSC is LaCo (arXiv 2402.11187), equation 1.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from slm_plugin.models.view import projections

RULES = ("telescoped", "rdsc", "mean", "keep_low", "keep_high", "ema(w)")
_EMA = re.compile(r"ema\((\d*\.?\d+)\)")


def check_rule(rule: str) -> str:
    """Return a rule's name if there is such a rule.

    Raises:
        ValueError: There is none.
    """
    match = _EMA.fullmatch(rule)
    if match and 0 <= float(match[1]) <= 1:
        return rule
    if rule not in RULES or rule == "ema(w)":
        raise ValueError(
            f"no merge rule is called '{rule}'; rules: {', '.join(RULES)} with w from 0 to 1"
        )
    return rule


def merge_weights(rule: str, weights: Sequence[Tensor]) -> Tensor:
    """Merge one projection of a run of layers.

    Args:
        rule: A name that `check_rule` accepts.
        weights: The projection's weight in every layer of the run, lowest first, each
            ``(out, in)``.

    Returns:
        The merged weight, ``(out, in)``: one of the given tensors where the rule only chooses.
    """
    if rule in ("telescoped", "keep_high"):
        # low + (low+1 - low) + … telescopes to the top layer; copying it is exact.
        return weights[-1]
    if rule == "keep_low":
        return weights[0]
    if rule == "mean":
        return _accurate(lambda wide: torch.stack(list(wide)).mean(0), weights)
    if rule == "rdsc":
        return _accurate(lambda wide: sum(wide[1:], -(len(wide) - 2) * wide[0]), weights)
    match = _EMA.fullmatch(rule)
    if match is None:
        raise ValueError(f"no merge rule is called '{rule}'")
    share = float(match[1])
    return _accurate(lambda wide: _moving_average(wide, share), weights)


def merged_layer(rule: str, layers: Sequence[nn.Module]) -> nn.Module:
    """One layer made of a run of layers, lowest first; the layers themselves stay as they are.

    Parameters that the rule only chooses are shared with the layer they come from, so that a
    trial of ``telescoped`` costs no memory.
    """
    merged = share_parameters(layers[-1] if rule == "keep_high" else layers[0])
    columns = [projections(layer) for layer in layers]
    for name, linear in projections(merged).items():
        chosen = [column[name].weight for column in columns]
        weight = merge_weights(rule, chosen)
        linear.weight = (
            weight
            if isinstance(weight, nn.Parameter)
            else nn.Parameter(weight, requires_grad=chosen[0].requires_grad)
        )
    return merged


def share_parameters(layer: nn.Module) -> nn.Module:
    """A second module tree over the same parameters, buffers and config."""
    shared: list[object] = [*layer.parameters(), *layer.buffers()]
    shared += [module.config for module in layer.modules() if hasattr(module, "config")]
    return copy.deepcopy(layer, {id(thing): thing for thing in shared})


def _moving_average(weights: Sequence[Tensor], share: float) -> Tensor:
    current = weights[0]
    for weight in weights[1:]:
        current = current + share * (weight - current)
    return current


@torch.no_grad()
def _accurate(rule: Callable[[Sequence[Tensor]], Tensor], weights: Sequence[Tensor]) -> Tensor:
    """Compute in float32 at least, and give back the weights' own number format."""
    wide = [
        weight.detach().to(torch.promote_types(weight.dtype, torch.float32)) for weight in weights
    ]
    return rule(wide).to(weights[0].dtype)
