"""Build the plan of a depth strategy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_plugin.models.view import DecoderView, layer_kinds
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
    """The plan of these operations for the session's present model.

    Args:
        pruner: The strategy.
        session: Holds the model.
        operations: The operations on its layers, in the order of the search.
        notes: Explanations; a note on the removed parameters is put before them.
        threshold: The threshold of the search, if it has one.
        trials: The accepted and rejected trials of the result, in order.
        explored: All other trials.
        layer_scores: The scores of the layers, if the strategy uses scores.

    Raises:
        PlanError: No checkpoint reader could build the pruned model.
        TargetError: The installed transformers could not load it.
    """
    before = session.view.dimensions()
    removed = sum(operation.layers_removed for operation in operations)
    after = before.without_layers(removed)
    if removed:
        share = removed * before.layer_parameters / session.original.parameters
        count = "1 layer is" if removed == 1 else f"{removed} layers are"
        notes = (f"{count} {share:.2%} of the original parameters", *notes)
    if not session.view.family.listed:
        name = session.view.family.architecture
        notes = (*notes, f"{name} is no listed family: its stack of layers passed a check")
    idle: tuple[str, ...] = ()
    if not removed:
        idle = (f"the target ({pruner.target.describe()}) removes nothing: no trial passed it",)
    return PruningPlan(
        pruner=pruner.name,
        kind=pruner.kind,
        options=pruner.options.model_dump(mode="json"),
        target=pruner.target,
        fingerprint=session.fingerprint(),
        before=before,
        after=after,
        operations=tuple(operations),
        threshold=threshold,
        trials=trials,
        explored=explored,
        layer_scores=layer_scores,
        followed_by=None if pruner.followed_by is None else dict(pruner.followed_by),
        notes=tuple(notes),
        warnings=(*idle, *portability(before, after, session.view.config)),
    )


def kinds_of(view: DecoderView) -> tuple[object, ...]:
    """What must be equal in layers that merge, for each; empty where all layers are alike.

    A layer that must stay where it is equals no other one.
    """
    kinds: list[object] = list(layer_kinds(view))
    kinds[: view.fixed_layers] = range(view.fixed_layers)
    return tuple(kinds) if len(set(kinds)) > 1 else ()


def unlike(kinds: tuple[object, ...]) -> str:
    """What limits a target besides protected layers, for messages."""
    return ", and layers of different kinds, which never merge," if kinds else ""
