"""Models of pruned shapes with random weights, which are made to be timed."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, cast

from slm_plugin.lazy import nn, torch
from slm_plugin.models.configuration import plain_attention
from slm_plugin.models.empty import empty_model
from slm_plugin.models.view import DecoderView, layer_kinds
from slm_plugin.pruners.hybrid.shapes import Shape
from slm_plugin.surgery.channels import sync_config
from slm_plugin.surgery.layers import cut_config

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

# Weights begin at multiples of this many numbers, as an allocator's would: 64 bytes and more.
_ALIGNMENT = 32


def stand_ins(
    view: DecoderView, shapes: Sequence[Shape], dtype: torch.dtype, device: torch.device
) -> list[PreTrainedModel]:
    """A model of the stock class with random weights for each shape.

    The config is the model's, with the shape's sizes. All models share one block of memory, as
    large as the largest of them: weights of one model never overlap, those of two may, so that
    any number of shapes is held in the memory of one. Random generators of the process are left
    alone.

    Args:
        view: The model whose shapes they are.
        shapes: The shapes.
        dtype: Number format of the weights.
        device: Where they are.
    """
    configs = [pruned_config(view, shape) for shape in shapes]
    if device.type == "cpu":
        # Other kernels do not run there.
        for config in configs:
            config._attn_implementation = plain_attention(view.model)
    with torch.random.fork_rng(devices=[]):
        made = [empty_model(config, dtype).eval() for config in configs]
    if view.tied:
        for model in made:
            _tie(model)
    sizes = [sum(_room(stub) for stub in _matrices(model)) for model in made]
    memory = torch.empty(max(sizes), dtype=dtype, device=device)
    memory.normal_(0, 0.02, generator=torch.Generator(device).manual_seed(0))
    for model in made:
        _fill(model, memory)
        # The buffers, which are computed from the config.
        model.to(device)
    return made


def pruned_config(view: DecoderView, shape: Shape) -> PretrainedConfig:
    """The config of a model pruned to a shape.

    Which layers go is not known yet: above those that have to stay, as many of each kind are kept
    as their share of the model is.

    Raises:
        UnsupportedModelError: Units go that cannot be removed from the family.
        TargetError: No model of this shape can be made of it.
    """
    dense, family = view.dimensions(), view.family
    after = shape.of_model(dense)
    config = copy.deepcopy(view.model.config)
    config.architectures = [type(view.model).__name__]
    config._attn_implementation = view.model.config._attn_implementation
    text = cast("PretrainedConfig", family.text_config(config))
    if shape.layers != dense.layers:
        cut_config(text, family, _kept(view, shape.layers))
    if (shape.mlp_width, shape.kv_groups) != (dense.intermediate_size, dense.kv_heads):
        sync_config(text, after)
    return config


def _kept(view: DecoderView, left: int) -> list[int]:
    """Indices of so many layers: the fixed ones, and of the others evenly spaced ones by kind."""
    kinds, fixed = layer_kinds(view), view.fixed_layers
    free = sorted(range(fixed, len(kinds)), key=lambda index: str(kinds[index]))
    count = left - fixed
    return sorted([*range(fixed), *(free[place * len(free) // count] for place in range(count))])


def _tie(model: PreTrainedModel) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    cast(nn.Linear, head).weight = cast(nn.Embedding, embedding).weight


def _matrices(model: PreTrainedModel) -> Iterator[Tensor]:
    """Parameters that lie in the shared memory: all but norms and biases, tied ones once."""
    return (parameter for parameter in model.parameters() if parameter.dim() > 1)


def _room(parameter: Tensor) -> int:
    return math.ceil(parameter.numel() / _ALIGNMENT) * _ALIGNMENT


def _fill(model: PreTrainedModel, memory: Tensor) -> None:
    """Give all parameters values: matrices a part of the memory each, norms and biases ones."""
    made: dict[int, nn.Parameter] = {}
    start = 0
    for stub in model.parameters():
        if stub.dim() > 1:
            values = memory[start : start + stub.numel()].view(stub.shape)
            start += _room(stub)
        else:
            values = torch.ones(stub.shape, dtype=memory.dtype, device=memory.device)
        # As in a loaded model: PyTorch multiplies by weights without gradients in another way.
        made[id(stub)] = nn.Parameter(values)
    for module in model.modules():
        for name, stub in list(module.named_parameters(recurse=False)):
            setattr(module, name, made[id(stub)])
