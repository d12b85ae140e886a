"""Merge rules: formulas that merge a run of layers, parameter by parameter.

A rule merges the parameters of attention and MLP: projections with their biases, and query and key
norms. The layer norms are the lowest layer's, except for ``keep_high``, which takes the whole top
layer. The released SLM code merges only the weights of the seven projections (``weights_only``), so
biases and query norms come from another layer than the projections.

Two rules of a recipe depend on data: ``activation`` weights every layer by its block influence, and
``best`` takes the rule with the best value for every run. A plan stores the resulting rule, so that
applying it needs no data.

Source: SLM (arXiv 2502.19159) and its released code; RDSC is LaCo (arXiv 2402.11187), equation 1.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_plugin.lazy import nn, no_grad, torch
from slm_plugin.models.streaming import derived, values
from slm_plugin.models.view import projections
from slm_plugin.plans.rules import factors, step_of

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.models.families.family import Family


def candidates(
    rule: str, first: int, last: int, influence: Callable[[], Sequence[float]]
) -> Iterator[str]:
    """The concrete rules of a plan to try for a recipe's rule and one run.

    Args:
        rule: A name that `check_rule` accepts.
        first: Lowest layer of the run.
        last: Highest layer of the run.
        influence: Returns the block influence of every layer.
    """
    if rule == "best":
        yield from ("telescoped", "keep_high", "keep_low", "mean", "rdsc")
    if rule in ("best", "activation"):
        run = influence()[first : last + 1]
        yield f"weighted({','.join(f'{part / sum(run):.6f}' for part in run)})"
    else:
        yield rule


def merge_weights(rule: str, weights: Sequence[Tensor]) -> Tensor:
    """Merge one parameter of a run of layers.

    Args:
        rule: A name that `candidates` gives.
        weights: The parameter in every layer of the run, lowest first, all of one shape.

    Returns:
        The merged parameter, in that shape: one of the given tensors where the rule only chooses;
        streamed if they are.

    Raises:
        PlanError: The rule is for another number of layers, or there is no such rule.
    """
    if rule in ("telescoped", "keep_high"):
        # low + (low+1 - low) + … telescopes to the top layer; copying it is exact.
        return weights[-1]
    if rule == "keep_low":
        return weights[0]
    factors(rule, len(weights))
    return derived(Merged(rule, tuple(weights)), weights)


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """A source of streamed values: a rule over other weights, computed on every read."""

    rule: str
    weights: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the merged weight."""
        return tuple(self.weights[0].shape)

    def read(self) -> Tensor:
        """Merge, with two of the weights in memory at a time."""
        return computed(self.rule, self.weights)


@no_grad
def computed(rule: str, weights: Sequence[Tensor]) -> Tensor:
    """Compute a rule that combines weights, with one weight in memory at a time.

    The sum is computed in float32 or wider, lowest layer first, so that streamed weights and
    weights in memory give the same bits. The result has the number format of the weights.
    Rules of early plans go layer by layer instead: `slm_plugin.plans.earlier`.
    """
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    merged = values(weights[0]).to(wide, copy=True)
    if (step := step_of(rule)) is not None:
        for weight in weights[1:]:
            merged += step * (values(weight).to(wide) - merged)
        return merged.to(weights[0].dtype)
    parts, whole = factors(rule, len(weights))
    merged.mul_(parts[0])
    for weight, part in zip(weights[1:], parts[1:], strict=True):
        merged.add_(values(weight).to(wide), alpha=part)
    return merged.div_(whole).to(weights[0].dtype)


def merged_layer(
    rule: str, layers: Sequence[nn.Module], family: Family, *, weights_only: bool = False
) -> nn.Module:
    """One layer merged from a run of layers, lowest first; the given layers are unchanged.

    Parameters that a rule only selects are shared with their layer, so that a trial of
    ``telescoped`` needs no memory.

    Raises:
        PlanError: The rule is for another number of layers, or there is no such rule.
    """
    if rule == "keep_high":
        return share_parameters(layers[-1])
    merged = share_parameters(layers[0])
    for name in _merged_names(merged, family, weights_only):
        owner, _, leaf = name.rpartition(".")
        given = [layer.get_parameter(name) for layer in layers]
        made = merge_weights(rule, given)
        if not isinstance(made, nn.Parameter):
            made = nn.Parameter(made, requires_grad=given[0].requires_grad)
        setattr(merged.get_submodule(owner), leaf, made)
    return merged


def _merged_names(layer: nn.Module, family: Family, weights_only: bool) -> Iterator[str]:
    weights = {id(linear.weight) for linear in projections(layer, family).values()}
    norms = tuple(f"{norm}." for norm in family.stream_norms)
    for name, parameter in layer.named_parameters():
        if not name.startswith(norms) and (not weights_only or id(parameter) in weights):
            yield name


def share_parameters(layer: nn.Module, *, own_config: bool = False) -> nn.Module:
    """A second module tree over the same parameters and buffers.

    Args:
        layer: The layer.
        own_config: Copy the config too, so that the copy computes as before when surgery writes
            other sizes into the model's.
    """
    shared: list[object] = [*layer.parameters(), *layer.buffers()]
    if not own_config:
        shared += [module.config for module in layer.modules() if hasattr(module, "config")]
    return copy.deepcopy(layer, {id(thing): thing for thing in shared})


def refittable(layer: nn.Module, family: Family) -> nn.Module:
    """A copy that shares all parameters but those of its ``down_proj``, which a repair writes."""
    made = share_parameters(layer)
    linear = projections(made, family)["down_proj"]
    for name, parameter in list(linear.named_parameters()):
        setattr(linear, name, nn.Parameter(parameter.detach().clone(), requires_grad=False))
    return made
