"""What a plan says of the calibration loss before and after it, in words."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from slm_plugin.plans.plan import PruningPlan

# A larger increase, in nats a token, is warned of: perplexity grows by more than e.
MOST = 1.0


def with_losses(plan: PruningPlan, before: float | None, after: float | None) -> PruningPlan:
    """The plan with the loss before and after it, and with a warning where the model is ruined.

    Args:
        plan: The plan.
        before: Mean next-token cross-entropy of the model in nats a token; None if not measured.
        after: The same of the planned model; NaN or infinity becomes a warning.
    """
    losses = {"loss_before": _stored(before), "loss_after": _stored(after)}
    made = plan.model_copy(update=losses)
    if after is not None and not math.isfinite(after):
        warning = "the pruned model gives NaN or infinity on the calibration set"
    else:
        warning = loss_warning(made)
    if not warning:
        return made
    return made.model_copy(update={"warnings": (*made.warnings, warning)})


def without_loss_after(plan: PruningPlan) -> PruningPlan:
    """The plan without what it says of the loss after it, which a change of operations changes."""
    warning = loss_warning(plan)
    kept = tuple(text for text in plan.warnings if text != warning)
    return plan.model_copy(update={"loss_after": None, "warnings": kept})


def loss_change(plan: PruningPlan) -> str:
    """Both losses in a phrase; empty where they were not measured."""
    if plan.loss_before is None or plan.loss_after is None:
        return ""
    repaired = "" if plan.followed_by is None else ", before the repair that follows"
    return (
        f"calibration loss {plan.loss_before:.3f} -> {plan.loss_after:.3f} nats a token{repaired}"
    )


def loss_warning(plan: PruningPlan) -> str:
    """Warning about a plan that ruins the model; empty where it does not.

    A plan with a recovery right behind it is not judged: the loss is that before the recovery.
    """
    before, after = plan.loss_before, plan.loss_after
    if before is None or after is None or plan.followed_by is not None or after - before <= MOST:
        return ""
    return (
        f"the plan raises the calibration loss from {before:.3f} to {after:.3f} nats a token, and "
        f"the pruned model is unusable as it is; what usually helps: {', '.join(_remedies(plan))}"
    )


def _remedies(plan: PruningPlan) -> Iterator[str]:
    yield "`recover: refit` as the next stage"
    if plan.kind == "width":
        return
    options = plan.options
    if options.get("compatibility") != "released":
        if options.get("criterion", "loss") != "loss":
            yield "`criterion: loss`"
        if options.get("search") == "sliding":
            yield "`search: greedy`"
    if plan.pruner != "repaired":
        yield "or `prune: repaired`"


def _stored(loss: float | None) -> float | None:
    return None if loss is None or not math.isfinite(loss) else round(loss, 6)
