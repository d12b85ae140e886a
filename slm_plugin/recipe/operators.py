"""What can follow a stage that inserts operators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from slm_plugin.export.base import Exporter
from slm_plugin.pruners.base import Pruner
from slm_plugin.recipe.mistakes import Placed, Problem
from slm_plugin.recovery.base import Recovery


def misplaced(
    stages: Sequence[Placed[Pruner | Recovery]], exporters: Sequence[Placed[Exporter]] = ()
) -> Iterator[Problem]:
    """Problems of what comes behind the first stage that inserts operators.

    Args:
        stages: The stages in order.
        exporters: What is written at the end.
    """
    remedies = (_remedy(stage.component) for stage in stages)
    first, remedy = next(((n, r) for n, r in enumerate(remedies) if r), (len(stages), ""))
    if not remedy:
        return
    name = stages[first].component.name
    for stage in stages[first + 1 :]:
        if isinstance(stage.component, Pruner) or stage.component.reference:
            yield Problem(
                stage.place,
                f"'{stage.component.name}' cannot follow '{name}', which inserts operators; "
                f"move it before '{name}' or remove one",
            )
    for exporter in exporters:
        if not exporter.component.operators:
            yield Problem(
                exporter.place,
                f"'{exporter.component.name}' cannot store the operators that '{name}' inserts; "
                f"export `onnx`, or {remedy}",
            )


def _remedy(stage: Pruner | Recovery) -> str:
    """What to do to have no operators; empty where the stage inserts none."""
    if isinstance(stage, Pruner):
        return stage.without_operators
    return "repair by `fold_linear` or `refit`" if stage.operators else ""
