"""How a run of layers becomes one: the merge rules, each a formula over one projection.

A rule merges what attention and MLP hold: projections with their biases, and the norms of queries
and keys. The gains of the layer's own norms stay the lowest layer's, except under ``keep_high``,
which takes the top layer whole. The released SLM code merges the weights of the seven projections
and nothing else (``weights_only``): a bias or a query norm then meets another layer's projection.

A recipe may also leave the choice to the data: ``activation`` weighs every layer of the run by what
it changes, and ``best`` takes for every run the rule that serves it best. A plan names what came of
it, so that carrying the plan out needs no data.

Source: SLM (arXiv 2502.19159) and its released code; RDSC is LaCo (arXiv 2402.11187), equation 1.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from slm_plugin.errors import PlanError
from slm_plugin.models.view import projections

RULES = ("telescoped", "rdsc", "mean", "keep_low", "keep_high", "ema(w)", "activation", "best")
_EMA = re.compile(r"ema\((\d*\.?\d+)\)")
_WEIGHTED = re.compile(r"weighted\((\d[\d.]*(?:,\d[\d.]*)*)\)")


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


def candidates(
    rule: str, first: int, last: int, influence: Callable[[], Sequence[float]]
) -> Iterator[str]:
    """The rules that a plan may hold, of those that a recipe's rule allows for one run.

    Args:
        rule: A name that `check_rule` accepts.
        first: Lowest layer of the run.
        last: Highest layer of the run.
        influence: Gives the block influence of every layer.
    """
    if rule == "best":
        yield from ("telescoped", "keep_high", "keep_low", "mean", "rdsc")
    if rule in ("best", "activation"):
        run = influence()[first : last + 1]
        yield f"weighted({','.join(f'{share / sum(run):.6f}' for share in run)})"
    else:
        yield rule


def merge_weights(rule: str, weights: Sequence[Tensor]) -> Tensor:
    """Merge one parameter of a run of layers.

    Args:
        rule: A name that `candidates` gives.
        weights: The parameter in every layer of the run, lowest first, all of one shape.

    Returns:
        The merged parameter, in that shape: one of the given tensors where the rule only chooses.

    Raises:
        PlanError: The rule is for another number of layers, or there is no such rule.
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
    if match := _EMA.fullmatch(rule):
        share = float(match[1])
        return _accurate(lambda wide: _moving_average(wide, share), weights)
    shares = [float(part) for part in _matched(_WEIGHTED, rule).split(",")]
    if len(shares) != len(weights):
        raise PlanError(f"the rule '{rule}' is for {len(shares)} layers, not {len(weights)}")
    return _accurate(lambda wide: _weighted_mean(wide, shares), weights)


def merged_layer(
    rule: str, layers: Sequence[nn.Module], *, weights_only: bool = False
) -> nn.Module:
    """One layer made of a run of layers, lowest first; the layers themselves stay as they are.

    Parameters that the rule only chooses are shared with the layer they come from, so that a
    trial of ``telescoped`` costs no memory.

    Raises:
        PlanError: The rule is for another number of layers, or there is no such rule.
    """
    if rule == "keep_high":
        return share_parameters(layers[-1])
    merged = share_parameters(layers[0])
    for name in _merged_names(merged, weights_only):
        owner, _, leaf = name.rpartition(".")
        given = [layer.get_parameter(name) for layer in layers]
        made = merge_weights(rule, given)
        if not isinstance(made, nn.Parameter):
            made = nn.Parameter(made, requires_grad=given[0].requires_grad)
        setattr(merged.get_submodule(owner), leaf, made)
    return merged


def _merged_names(layer: nn.Module, weights_only: bool) -> Iterator[str]:
    weights = {id(linear.weight) for linear in projections(layer).values()}
    for name, parameter in layer.named_parameters():
        if name.startswith(("self_attn.", "mlp.")) and (
            not weights_only or id(parameter) in weights
        ):
            yield name


def share_parameters(layer: nn.Module) -> nn.Module:
    """A second module tree over the same parameters, buffers and config."""
    shared: list[object] = [*layer.parameters(), *layer.buffers()]
    shared += [module.config for module in layer.modules() if hasattr(module, "config")]
    return copy.deepcopy(layer, {id(thing): thing for thing in shared})


def _matched(pattern: re.Pattern[str], rule: str) -> str:
    match = pattern.fullmatch(rule)
    if match is None:
        raise PlanError(f"no merge rule is called '{rule}'", hint=f"rules: {', '.join(RULES)}")
    return match[1]


def _weighted_mean(weights: Sequence[Tensor], shares: Sequence[float]) -> Tensor:
    total = torch.zeros_like(weights[0])
    for weight, share in zip(weights, shares, strict=True):
        total += (share / sum(shares)) * weight
    return total


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
