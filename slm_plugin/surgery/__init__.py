"""Carry plans out: the only code that changes a model's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_plugin.errors import PlanError, VerificationError
from slm_plugin.models.operators import operators
from slm_plugin.plans import (
    DepthOperation,
    KeepChannels,
    KeepHeads,
    Operation,
    PruningPlan,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from slm_plugin.models.fingerprint import Fingerprint
    from slm_plugin.models.view import Dimensions


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


def refuse_other_model(plan: PruningPlan, model: PreTrainedModel, found: Fingerprint) -> None:
    """Refuse a plan for a model that it was not made for.

    Args:
        plan: The plan.
        model: The model.
        found: The model's fingerprint.

    Raises:
        PlanError: The fingerprints differ, or the model has operators between its layers.
    """
    if operators(model):
        raise PlanError(
            "the model has operators between its layers, which were fitted to those layers",
            hint="prune before the recovery that puts them there",
        )
    differs = [
        name
        for name in type(found).model_fields
        if getattr(found, name) != getattr(plan.fingerprint, name)
    ]
    if differs:
        raise PlanError(
            f"the plan was made for another model: {', '.join(differs)} differ",
            hint="apply it to the checkpoint and dtype that it was made for, or plan anew",
        )


def verify(plan: PruningPlan, measured: Dimensions) -> None:
    """Hold a plan's promise against what its model measures now.

    Raises:
        VerificationError: They differ.
    """
    differs = [
        f"{name} is {getattr(measured, name)}, promised {getattr(plan.after, name)}"
        for name in type(measured).model_fields
        if getattr(measured, name) != getattr(plan.after, name)
    ]
    if differs:
        raise VerificationError(f"surgery did not keep the plan's promise: {'; '.join(differs)}")
