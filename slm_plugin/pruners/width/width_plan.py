"""The plan that removes the same units from every layer."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from slm_plugin.models.dimensions import Dimensions
from slm_plugin.plans import Operation, PruningPlan, UnitScores
from slm_plugin.pruners.base import Pruner
from slm_plugin.target import Target

if TYPE_CHECKING:
    from slm_plugin.session import Session


def width_plan(
    pruner: Pruner,
    session: Session,
    after: Dimensions,
    operations: Iterable[Operation],
    scores: tuple[UnitScores, ...],
    kept: str,
    warnings: tuple[str, ...],
) -> PruningPlan:
    """Put a width plan together.

    Args:
        pruner: The strategy.
        session: The session, with the model as it is.
        after: Dimensions that the model will have.
        operations: What every layer keeps.
        scores: The scores that decided.
        kept: A sentence on what every layer keeps.
        warnings: What not every reader of the result takes.
    """
    before = session.view.dimensions()
    return PruningPlan(
        pruner=pruner.name,
        kind="width",
        options=pruner.options.model_dump(mode="json"),
        target=pruner.target,
        fingerprint=session.fingerprint(),
        before=before,
        after=after,
        operations=tuple(operations),
        scores=scores,
        followed_by=None if pruner.followed_by is None else dict(pruner.followed_by),
        notes=(kept, _size_note(pruner.target, session.original, before, after)),
        warnings=warnings,
    )


def _size_note(target: Target, original: Dimensions, before: Dimensions, after: Dimensions) -> str:
    """How a size was met, for the notes of a plan."""
    wanted = target.parameters_to_remove(original.parameters, before.parameters)
    removed = before.parameters - after.parameters
    return (
        f"target {target.describe()}: {wanted:,} parameters requested, {removed:,} removed, "
        f"{after.parameters:,} left; {removed / original.parameters:.2%} of the original and "
        f"{removed / before.parameters:.2%} of the current parameters"
    )
