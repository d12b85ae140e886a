"""Layers composed of the blocks that remain when attention and MLP blocks are dropped."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slm_plugin.surgery.merge_rules import share_parameters

if TYPE_CHECKING:
    from torch import nn

    from slm_plugin.models.families.family import Family


def composed_layer(attention: nn.Module, mlp: nn.Module, family: Family) -> nn.Module:
    """The attention of one layer followed by the MLP of another, each with its own norms.

    The new layer shares the parameters; the given layers are unchanged.
    """
    made = share_parameters(attention)
    for name in family.mlp:
        setattr(made, name, share_parameters(mlp.get_submodule(name)))
    return made
