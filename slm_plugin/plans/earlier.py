"""What plans of earlier versions mean by the fields that they do not have.

A version that knows a field writes it, so a plan without it is older. What such a plan means is
not always the field's default.
"""

from __future__ import annotations

from slm_plugin.plans.operations import MergeLayers, Operation
from slm_plugin.plans.plan import PruningPlan
from slm_plugin.plans.rules import stepwise_rule


def as_written(plan: PruningPlan) -> PruningPlan:
    """A plan that has just been read, with its operations as its version applied them.

    Models have stated their experts since 27 November 2026, later than the last field that an
    operation got whose absence means something else than its default. In a plan with that statement
    an operation without that field is written by hand, and the default holds.
    """
    if "experts" in plan.before.model_fields_set:
        return plan
    return plan.model_copy(update={"operations": tuple(map(_as_written, plan.operations))})


def _as_written(operation: Operation) -> Operation:
    """Rules merged the weights of projections alone until merge_layers had ``weights_only``.

    Until then a moving average was computed layer by layer, too. The result is rounded otherwise
    than that of the closed form, and the next plan of a recipe is for exactly these weights.
    """
    if not isinstance(operation, MergeLayers) or "weights_only" in operation.model_fields_set:
        return operation
    meant = {"weights_only": True, "rule": stepwise_rule(operation.rule)}
    return operation.model_copy(update=meant)
