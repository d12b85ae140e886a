"""Layers composed of the blocks that remain when attention and MLP blocks are dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slm_plugin.surgery.merge_rules import share_parameters

if TYPE_CHECKING:
    from torch import nn

# The modules of a layer's MLP block in all supported architectures; the others are attention.
MLP_BLOCK = ("mlp", "post_attention_layernorm")


def composed_layer(attention: nn.Module, mlp: nn.Module) -> nn.Module:
    """The attention of one layer followed by the MLP of another, each with its own norm.

    The new layer shares the parameters; the given layers are unchanged.
    """
    made = share_parameters(attention)
    for name in MLP_BLOCK:
        setattr(made, name, share_parameters(mlp.get_submodule(name)))
    return made
