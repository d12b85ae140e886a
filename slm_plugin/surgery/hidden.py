"""Removal of hidden channels: the residual stream becomes narrower in the whole model.

A norm divides by the root mean square over the channels that there are. With d channels before and
d' after, it computes what the norm over d channels does with the removed ones at 0, if its weight
is multiplied by sqrt(d/d') and its epsilon by d/d':

    sqrt(d/d') x / sqrt(S/d' + e d/d') = x / sqrt(S/d + e),  S the sum of squares of the kept ones.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from slm_plugin.lazy import nn, torch
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.view import MLP_PROJECTIONS, DecoderView
from slm_plugin.surgery.groups import READERS

EPSILON = "variance_epsilon"


class Coupled(NamedTuple):
    """A parameter with one entry, row or column for every hidden channel.

    Attributes:
        module: The module that has it.
        name: Its name there.
        axis: Its axis that the channels are on.
        place: The block whose input it reads or writes to: 0 is the attention of layer 0, 1 its
            MLP, and twice the number of layers the head. None for the weight of a norm.
    """

    module: nn.Module
    name: str
    axis: int
    place: int | None = None

    @property
    def parameter(self) -> nn.Parameter:
        """The parameter."""
        return self.module.get_parameter(self.name)


def coupled(view: DecoderView) -> Iterator[Coupled]:
    """Every parameter that loses something with a hidden channel; a tied head's comes once."""
    yield Coupled(view.embedding, "weight", 1, 0)
    if not view.tied:
        yield Coupled(view.head, "weight", 1, 2 * len(view.layers))
    for index, layer in enumerate(view.layers):
        for name, linear in view.projections(layer).items():
            # What reads units writes to the stream, which the next block reads.
            writes = name in READERS
            in_mlp = view.family.parts(name)[0] in MLP_PROJECTIONS
            place = 2 * index + in_mlp + writes
            yield Coupled(linear, "weight", 0 if writes else 1, place)
            if writes and linear.bias is not None:
                yield Coupled(linear, "bias", 0, place)
    for norm in _stream_norms(view):
        yield Coupled(norm, "weight", 0)


def keep_hidden(view: DecoderView, kept: Sequence[int], after: Dimensions) -> None:
    """Keep some channels of the residual stream.

    The model then computes what it did with the other channels at 0 everywhere.

    Args:
        view: The model, changed in place. Its class allows it: `Family.hidden_channels`.
        kept: Channels to keep, ascending.
        after: Dimensions of the result.
    """
    factor = view.embedding.embedding_dim / len(kept)
    _scale_norms(view, factor)
    tied = view.tied
    for one in list(coupled(view)):
        _keep(one, kept)
    if tied:
        view.head.weight = view.embedding.weight
    _sync_modules(view, len(kept))
    config = view.config
    config.hidden_size = len(kept)
    # A missing one would be derived from the hidden size.
    config.head_dim = after.head_dim
    config.rms_norm_eps = config.rms_norm_eps * factor


def _stream_norms(view: DecoderView) -> Iterator[nn.Module]:
    for layer in view.layers:
        yield from map(layer.get_submodule, view.family.stream_norms)
    yield view.norm


def _keep(one: Coupled, kept: Sequence[int]) -> None:
    """Keep entries of a parameter; ``requires_grad`` is unchanged."""
    former = one.parameter
    chosen = torch.tensor(kept, device=former.device)
    left = former.detach().index_select(one.axis, chosen)
    setattr(one.module, one.name, nn.Parameter(left, requires_grad=former.requires_grad))


def _sync_modules(view: DecoderView, hidden: int) -> None:
    """Update the sizes stored in modules."""
    view.embedding.embedding_dim = hidden
    for linear in (view.head, *(m for one in view.layers for m in view.projections(one).values())):
        linear.out_features, linear.in_features = linear.weight.shape
    for module in view.decoder.modules():
        # Not `hasattr`: a class may give the config's value as a property.
        if "hidden_size" in vars(module):
            vars(module)["hidden_size"] = hidden


def _scale_norms(view: DecoderView, factor: float) -> None:
    """Let every norm of the stream divide as if the removed channels were there and 0.

    The config holds one epsilon for all norms. Those of the queries and keys (Qwen3) see vectors
    of unchanged length, so what they normalise is multiplied by the root of the epsilon's factor,
    which their division takes out again.
    """
    scaled = [norm.get_parameter("weight") for norm in _stream_norms(view)]
    for module in view.decoder.modules():
        if hasattr(module, EPSILON):
            setattr(module, EPSILON, getattr(module, EPSILON) * factor)
    for layer in view.layers:
        attention, modules = layer.get_submodule(view.family.attention[0]), view.projections(layer)
        for part in "qk":
            if hasattr(attention, f"{part}_norm"):
                scaled += modules[f"{part}_proj"].parameters()
    with torch.no_grad():
        for parameter in scaled:
            parameter.copy_(parameter.double() * math.sqrt(factor))
