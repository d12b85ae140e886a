"""Polish a finished plan of dropped layers by exchanges, and the strategy that the plan is of."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, ValidationError

from slm_plugin.errors import PlanError, SlmError, TargetError
from slm_plugin.plans import DepthOperation, DropLayers, PruningPlan
from slm_plugin.plans.operations import by_kind
from slm_plugin.pruners.base import Pruner
from slm_plugin.pruners.depth.depth_plan import depth_plan
from slm_plugin.pruners.depth.search.exchanges import Judge, polished
from slm_plugin.registry import nearest, pruners
from slm_plugin.target import Target
from slm_plugin.texts import first_problem

if TYPE_CHECKING:
    from slm_plugin.session import Session


def _check(start: dict[str, Any]) -> dict[str, Any]:
    """Check the strategy's name and options, and that it drops layers as far as is known."""
    kind, _ = _options(start)
    if kind.kind != "depth" or kind.merges:
        raise ValueError(
            f"'{kind.name}' does more than drop whole layers, and only those can be exchanged"
        )
    return start


def _options(start: dict[str, Any]) -> tuple[type[Pruner], Any]:
    if "prune" not in start:
        raise ValueError("give the strategy, as in `{prune: block_influence}`")
    if "target" in start:
        raise ValueError("the target of this stage is that of its start too; leave it out here")
    try:
        kind: type[Pruner] = pruners.get(str(start["prune"]))
        options = {key: value for key, value in start.items() if key != "prune"}
        return kind, kind.Options.model_validate(options)
    except SlmError as error:
        raise ValueError(str(error)) from error
    except ValidationError as error:
        raise ValueError(_told(kind, error)) from error


def _told(kind: type[Pruner], error: ValidationError) -> str:
    """The first thing that is wrong with the options of a strategy."""
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"]))
    if first["type"] != "extra_forbidden":
        return first_problem(error)
    guess = nearest(name, list(kind.Options.model_fields))
    return f"'{kind.name}' has no option '{name}'" + (f"; did you mean '{guess}'?" if guess else "")


# A strategy with its options, as a stage of a recipe names it, without a target.
Start = Annotated[dict[str, Any], AfterValidator(_check)]


def starting(start: dict[str, Any], target: Target) -> Pruner:
    """The strategy of a start.

    Raises:
        TargetError: It takes no such target.
    """
    kind, options = _options(start)
    if target.kind not in kind.targets:
        raise TargetError(
            f"the start '{kind.name}' takes no target of kind '{target.kind}'",
            hint=f"it takes: {', '.join(kind.targets)}",
        )
    return kind(options, target)


def dropped_by(plan: PruningPlan, eligible: Collection[int]) -> tuple[int, ...]:
    """The layers that a plan drops, ascending.

    Args:
        plan: The plan.
        eligible: Layers that may be dropped.

    Raises:
        PlanError: It does something else, or drops another layer.
    """
    operations = [one for one in plan.operations if isinstance(one, DropLayers)]
    if len(operations) < len(plan.operations):
        raise PlanError(
            f"the plan of '{plan.pruner}' does more than drop whole layers, and only those can be "
            "exchanged",
            hint="set `polish: 0`, or start from another strategy",
        )
    dropped = tuple(sorted(index for one in operations for index in one.indices))
    if not {*dropped} <= {*eligible}:
        raise PlanError(
            f"the start '{plan.pruner}' drops layer {min({*dropped} - {*eligible})}, which is "
            "protected here",
            hint="protect it in `start` too, or allow it here",
        )
    return dropped


def polished_plan(
    pruner: Pruner,
    session: Session,
    begun: PruningPlan,
    judge: Judge,
    eligible: Sequence[int],
    tries: int,
    meaning: str,
) -> PruningPlan:
    """A finished plan, or a better one that exchanges lead to.

    Args:
        pruner: The strategy that polishes.
        session: Holds the model.
        begun: The finished plan, of whole layers that are dropped.
        judge: Gives the value of a set of dropped layers.
        eligible: Layers that may be dropped.
        tries: Most exchanges to try.
        meaning: A note on what the values are.

    Raises:
        PlanError: The plan does more than drop layers that may be dropped.
    """
    dropped = dropped_by(begun, eligible)
    best, others = polished(dropped, eligible, tries, session.seed, judge)
    first, last = best[0], best[-1]
    notes = [
        meaning,
        f"{len(best) + len(others) - 1} exchanges were tried on the plan of '{begun.pruner}', "
        f"layers {', '.join(map(str, dropped))}, and {len(best) - 1} accepted: similarity "
        f"{first.value:.4f} to {last.value:.4f}",
    ]
    operations: Sequence[DepthOperation] = by_kind(begun.operations)[0]
    if len(best) > 1:
        operations = [DropLayers(indices=last.dropped)]
        notes.append("the layers were chosen together: no part of them is a smaller plan")
    return depth_plan(
        pruner,
        session,
        operations,
        notes,
        trials=tuple(tried.trial(accepted=True) for tried in best),
        explored=tuple(tried.trial(accepted=False) for tried in others),
    )
