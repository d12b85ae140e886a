"""Carry plans out: the only code that changes a model's shape."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slm_plugin.errors import PlanError, VerificationError
from slm_plugin.models.operators import operators
from slm_plugin.pruners.plan import DepthOperation, KeepChannels, KeepHeads, PruningPlan

if TYPE_CHECKING:
    from slm_plugin.session import Session


def apply(plan: PruningPlan, session: Session) -> None:
    """Carry a plan out on the session's model, in place.

    Raises:
        PlanError: The plan was made for another model, or its operations contradict one another.
        MissingExtraError: The plan cuts width and torch-pruning is not installed.
        VerificationError: The result does not measure what the plan promises.
    """
    if operators(session.model):
        raise PlanError(
            "the model has operators between its layers, and what they make up for is settled",
            hint="prune before the recovery that puts them there",
        )
    found = session.fingerprint()
    if found != plan.fingerprint:
        differs = [
            name
            for name in type(found).model_fields
            if getattr(found, name) != getattr(plan.fingerprint, name)
        ]
        raise PlanError(
            f"the plan was made for another model: {', '.join(differs)} differ",
            hint="apply it to the checkpoint and dtype that it was made for, or plan anew",
        )
    depth = [op for op in plan.operations if isinstance(op, DepthOperation)]
    width = [op for op in plan.operations if isinstance(op, KeepChannels | KeepHeads)]
    if depth and width:
        raise PlanError(
            "the plan mixes depth and width operations", hint="make it two plans, one a stage"
        )
    try:
        if depth:
            from slm_plugin.surgery.layers import apply_layers

            session.layers_changed(apply_layers(session.model, depth))
        if width:
            from slm_plugin.surgery.channels import apply_channels

            apply_channels(session.model, width)
    finally:
        session.model_changed()
    measured = session.view.dimensions()
    if measured != plan.after:
        differs = [
            f"{name} is {getattr(measured, name)}, promised {getattr(plan.after, name)}"
            for name in type(measured).model_fields
            if getattr(measured, name) != getattr(plan.after, name)
        ]
        raise VerificationError(f"surgery did not keep the plan's promise: {'; '.join(differs)}")
