"""What the stages of a recipe ask of a model, checked before the first of them runs."""

from __future__ import annotations

from collections.abc import Sequence

from slm_plugin.errors import TargetError
from slm_plugin.models.view import Dimensions
from slm_plugin.pruners.base import Pruner, layers_to_remove
from slm_plugin.recipe import Stage


def refuse_targets(stages: Sequence[Stage], original: Dimensions) -> None:
    """Refuse targets that are out of reach, each of the model that the stages before it leave.

    How much a threshold or a cut in width takes is known when it is planned; here they take
    nothing.

    Raises:
        TargetError: A stage cannot reach its target.
    """
    current = original
    for index, stage in enumerate(stages):
        if not isinstance(stage, Pruner):
            continue
        try:
            stage.check_target(original, current)
        except TargetError as error:
            found = "" if current == original else ", as the stages before it leave it"
            raise TargetError(
                f"stages.{index} ({stage.name}): {error.message}{found}", hint=error.hint
            ) from error
        current = _left(stage, original, current)


def _left(stage: Pruner, original: Dimensions, current: Dimensions) -> Dimensions:
    """What a stage leaves of a model, where its target says so."""
    if stage.kind != "depth" or stage.target.kind == "threshold":
        return current
    try:
        return current.without_layers(layers_to_remove(stage.target, original, current))
    except TargetError:
        # A strategy from elsewhere may count in another way.
        return current
