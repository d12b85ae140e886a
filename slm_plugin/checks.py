"""Check the targets of all stages before the first one runs."""

from __future__ import annotations

from collections.abc import Sequence

from slm_plugin.errors import TargetError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.pruners.base import Pruner, layers_to_remove, refuse_uneven
from slm_plugin.recipe import Stage


def refuse_targets(stages: Sequence[Stage], original: Dimensions) -> None:
    """Check that every target can be reached after the earlier stages.

    The effect of width pruning, and of thresholds, latency and memory, is unknown before planning;
    here they count as removing nothing.

    Raises:
        TargetError: A stage cannot reach its target.
        UnsupportedModelError: Layers differ in width, and a stage needs equal ones.
    """
    current = original
    for index, stage in enumerate(stages):
        if not isinstance(stage, Pruner):
            continue
        refuse_uneven(stage, current)
        try:
            stage.check_target(original, current)
        except TargetError as error:
            found = "" if current == original else ", after the earlier stages"
            raise TargetError(
                f"stages.{index} ({stage.name}): {error.message}{found}", hint=error.hint
            ) from error
        current = _left(stage, original, current)


def _left(stage: Pruner, original: Dimensions, current: Dimensions) -> Dimensions:
    """The dimensions after a stage, if its target determines them."""
    if stage.kind != "depth" or not stage.target.counts:
        return current
    try:
        return current.without_layers(layers_to_remove(stage.target, original, current))
    except TargetError:
        # A third-party strategy may count differently.
        return current
