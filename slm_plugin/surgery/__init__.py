"""Carry plans out: the only code that changes a model's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_plugin.errors import PlanError
from slm_plugin.pruners.plan import DepthOperation, KeepChannels, KeepHeads, Operation

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def carry_out(model: PreTrainedModel, operations: Sequence[Operation]) -> list[tuple[int, int]]:
    """Carry the operations of a plan out on the model that it was made for, in place.

    `slm_plugin.session.Session.apply` is how a plan reaches this, with all checks.

    Returns:
        For every layer that is left the lowest and the highest layer that it is made of.

    Raises:
        PlanError: The operations contradict one another.
        MissingExtraError: They cut width and torch-pruning is not installed.
    """
    depth = [op for op in operations if isinstance(op, DepthOperation)]
    width = [op for op in operations if isinstance(op, KeepChannels | KeepHeads)]
    if depth and width:
        raise PlanError(
            "the plan mixes depth and width operations", hint="make it two plans, one a stage"
        )
    if depth:
        from slm_plugin.surgery.layers import apply_layers

        return apply_layers(model, depth)
    if width:
        from slm_plugin.surgery.channels import apply_channels

        apply_channels(model, width)
    return [(index, index) for index in range(model.config.num_hidden_layers)]
