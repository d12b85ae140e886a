"""The plan of what a search has found."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_plugin.plans import DepthOperation, PruningPlan
from slm_plugin.pruners.base import Pruner
from slm_plugin.pruners.depth.depth_plan import depth_plan
from slm_plugin.pruners.depth.measures.criteria import CRITERIA, CriterionName
from slm_plugin.pruners.depth.search.runs import Found
from slm_plugin.pruners.depth.search.trials import Trials

if TYPE_CHECKING:
    from slm_plugin.session import Session


def found_plan(
    pruner: Pruner,
    session: Session,
    criterion: CriterionName,
    trials: Trials,
    found: Found,
    operations: Sequence[DepthOperation] | None = None,
) -> PruningPlan:
    """The plan of a search's result, with all its trials.

    Args:
        pruner: The strategy.
        session: Holds the model.
        criterion: What the trials measured.
        trials: All that were made.
        found: The result.
        operations: What the plan does; by default an operation for every run, in their order.

    Raises:
        PlanError: No checkpoint reader could build the pruned model.
        TargetError: The installed transformers could not load it.
    """
    meaning = CRITERIA[criterion].meaning
    notes = (f"similarity: {meaning}, mean over the calibration samples", *found.notes)
    return depth_plan(
        pruner,
        session,
        [run.operation for run in found.runs] if operations is None else operations,
        notes if found.runs else ["no layers are merged"],
        threshold=found.threshold,
        trials=found.trials,
        explored=tuple(trials.others(found)),
    )
