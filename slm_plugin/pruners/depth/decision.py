"""A depth strategy's decision as a plan: what every one of them writes down alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_plugin.errors import UnsupportedModelError
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import DepthOperation, LayerScores, PruningPlan, Trial
from slm_plugin.pruners.base import Pruner
from slm_plugin.surgery.portability import portability

if TYPE_CHECKING:
    from slm_plugin.session import Session


def depth_plan(
    pruner: Pruner,
    session: Session,
    operations: Sequence[DepthOperation],
    notes: Sequence[str],
    *,
    threshold: float | None = None,
    trials: tuple[Trial, ...] = (),
    explored: tuple[Trial, ...] = (),
    layer_scores: LayerScores | None = None,
) -> PruningPlan:
    """The plan of these operations for the session's model as it is.

    Args:
        pruner: Who decided.
        session: Gives the model.
        operations: What happens to its layers, in the order in which it was decided.
        notes: Why, in sentences; how many parameters go is said before them.
        threshold: The threshold that decided, if one did.
        trials: The trials of the decision, in their order.
        explored: Further trials on the way there.
        layer_scores: The scores that decided, if scores did.

    Raises:
        PlanError: No reader could build the model that the plan leaves.
        TargetError: The installed transformers would refuse to load it.
    """
    before = session.view.dimensions()
    removed = sum(operation.layers_removed for operation in operations)
    after = before.without_layers(removed)
    if removed:
        share = removed * before.layer_parameters / session.original.parameters
        count = "1 layer is" if removed == 1 else f"{removed} layers are"
        notes = (f"{count} {share:.2%} of the original parameters", *notes)
    idle: tuple[str, ...] = ()
    if not removed:
        idle = (f"the target ({pruner.target.describe()}) removes nothing: no trial passed it",)
    return PruningPlan(
        pruner=pruner.name,
        kind=pruner.kind,
        options=pruner.options.model_dump(),
        target=pruner.target,
        fingerprint=session.fingerprint(),
        before=before,
        after=after,
        operations=tuple(operations),
        threshold=threshold,
        trials=trials,
        explored=explored,
        layer_scores=layer_scores,
        notes=tuple(notes),
        warnings=(*idle, *portability(before, after, session.model.config)),
    )


def refuse_mixed_kinds(pruner: Pruner, view: DecoderView) -> None:
    """Refuse to merge where layers attend in different ways.

    Raises:
        UnsupportedModelError: The layers are of different kinds.
    """
    kinds = sorted(set(getattr(view.config, "layer_types", None) or ()))
    if len(kinds) > 1:
        raise UnsupportedModelError(
            f"the model's layers are of different kinds ({', '.join(kinds)})",
            hint=f"{pruner.name} merges only layers of one kind",
        )
