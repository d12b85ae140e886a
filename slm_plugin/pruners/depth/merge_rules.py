"""How a run of layers becomes one: the merge rules, each a formula over one projection.

Only the weights of the seven projections are merged. Everything else of the merged layer (norm
gains, biases, q/k norms) is the lowest layer's, as in the released SLM code, except under
``keep_high``, which takes the top layer whole.

Source: SLM (arXiv 2502.19159) and its released code; RDSC is LaCo (arXiv 2402.11187), equation 1.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from slm_plugin.models.streaming import StreamedParameter, values
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
        The merged weight, ``(out, in)``: one of the given tensors where the rule only chooses;
        streamed if they are.
    """
    if rule in ("telescoped", "keep_high"):
        # low + (low+1 - low) + … telescopes to the top layer; copying it is exact.
        return weights[-1]
    if rule == "keep_low":
        return weights[0]
    check_rule(rule)
    streamed = next((w for w in weights if isinstance(w, StreamedParameter)), None)
    if streamed is not None:
        return StreamedParameter(Merged(rule, tuple(weights)), streamed.dtype, streamed.home)
    return computed(rule, weights)


@dataclass(frozen=True, slots=True, eq=False)
class Merged:
    """A source of streamed values: a rule over other weights, worked out at every reading."""

    rule: str
    weights: tuple[Tensor, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the merged weight."""
        return tuple(self.weights[0].shape)

    def read(self) -> Tensor:
        """Merge, with two of the weights in memory at a time."""
        return computed(self.rule, self.weights)


@torch.no_grad()
def computed(rule: str, weights: Sequence[Tensor]) -> Tensor:
    """Work out a rule that does more than choose, taking one weight after the other.

    Sums run in float32 at least, lowest layer first, so that streamed weights and weights in
    memory give the same bits; the result has the weights' own number format.
    """
    wide = torch.promote_types(weights[0].dtype, torch.float32)
    rest = (values(weight).to(wide) for weight in weights[1:])
    merged = values(weights[0]).to(wide, copy=True)
    if rule == "rdsc":
        merged *= -(len(weights) - 2)
    match = _EMA.fullmatch(rule)
    for weight in rest:
        merged += float(match[1]) * (weight - merged) if match else weight
    if rule == "mean":
        merged /= len(weights)
    return merged.to(weights[0].dtype)


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
