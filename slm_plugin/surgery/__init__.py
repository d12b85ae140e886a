"""Apply plans: the only code that changes a model's shape."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_plugin.errors import PlanError, VerificationError
from slm_plugin.models.operators import operators
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import Operation, PruningPlan
from slm_plugin.plans.operations import by_kind
from slm_plugin.plans.steps import Step, steps_of
from slm_plugin.plans.stream import stream_change

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from slm_plugin.models.dimensions import Dimensions
    from slm_plugin.models.fingerprint import Fingerprint


def apply_operations(
    model: PreTrainedModel,
    operations: Sequence[Operation],
    stack: str | None = None,
    basis: Tensor | None = None,
) -> list[tuple[int, int]]:
    """Apply the operations of a plan, or of one step of it, to its model, in place.

    `slm_plugin.session.Session.apply` calls this after all checks.

    Args:
        model: The model.
        operations: What is done in one step.
        stack: Which of its two stacks of layers, where it has two.
        basis: The basis into which they rotate the residual stream, ``(hidden, hidden)``, or those
            of all blocks and of the head, ``(2 * layers + 1, hidden, hidden)``.

    Returns:
        For every remaining layer, the lowest and the highest original layer in it.

    Raises:
        PlanError: The operations contradict one another.
        MissingExtraError: They remove channels or heads and torch-pruning is not installed.
    """
    depth, width = by_kind(operations)
    stream = stream_change(operations)
    if depth and (width or stream):
        raise PlanError(
            "the plan mixes depth and width operations",
            hint="make it two plans, one per stage, or one of kind hybrid",
        )
    if depth:
        from slm_plugin.surgery.layers import apply_layers

        return apply_layers(model, depth, stack)
    if width or stream:
        from slm_plugin.surgery.channels import apply_channels

        apply_channels(model, width, stream, basis)
    return [(index, index) for index in range(len(DecoderView.of(model, stack).layers))]


def checked_steps(plan: PruningPlan, before: Dimensions) -> list[Step]:
    """The steps of a plan, the second of which is checked before the first one changes the model.

    Args:
        plan: The plan.
        before: Dimensions of the model.

    Raises:
        PlanError: The operations of a hybrid plan contradict one another.
        TargetError: The installed transformers could not load the result.
        MissingExtraError: Channels or heads are removed and torch-pruning is not installed.
    """
    steps = steps_of(plan)
    if plan.kind == "hybrid":
        from slm_plugin.surgery.portability import refuse_unloadable
        from slm_plugin.surgery.removal import removal_behind

        (layers, _), (_, units) = (by_kind(step.operations) for step in steps)
        removal = removal_behind(layers, units, before, stream_change(plan.operations))
        refuse_unloadable(removal.before, removal.after)
    return steps


def refuse_operators(model: PreTrainedModel) -> None:
    """Check that a model has no operators.

    Raises:
        PlanError: Some do.
    """
    if operators(model):
        raise PlanError(
            "the model has operators, which were made for these layers",
            hint="prune before the stage that inserts them",
        )


def refuse_other_model(plan: PruningPlan, model: PreTrainedModel, found: Fingerprint) -> None:
    """Check that a plan was made for a model.

    Args:
        plan: The plan.
        model: The model.
        found: The model's fingerprint.

    Raises:
        PlanError: The fingerprints differ, or the model has operators.
    """
    refuse_operators(model)
    differs = [
        name
        for name in type(found).model_fields
        if getattr(found, name) != getattr(plan.fingerprint, name)
    ]
    if differs:
        raise PlanError(
            f"the plan was made for another model: {', '.join(differs)} differ",
            hint="apply it to the checkpoint and dtype that it was made for, or plan again",
        )


def verify(plan: PruningPlan, measured: Dimensions) -> None:
    """Check that the pruned model has the dimensions that the plan states.

    Raises:
        VerificationError: They differ.
    """
    differs = [
        f"{name} is {getattr(measured, name)}, the plan states {getattr(plan.after, name)}"
        for name in type(measured).model_fields
        # A plan of an earlier version states nothing about what that version did not know.
        if name in plan.after.model_fields_set
        and getattr(measured, name) != getattr(plan.after, name)
    ]
    if differs:
        raise VerificationError(f"the pruned model does not match its plan: {'; '.join(differs)}")
