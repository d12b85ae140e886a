"""Repair layer by layer from the bottom up."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from slm_plugin.progress import track
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.restoration.boundaries import NOTHING_MISSING, note_below, reference_of
from slm_plugin.restoration.layer_walk import FittedLayer, LayerWalk
from slm_plugin.restoration.rewriting import Write, rewriting

if TYPE_CHECKING:
    from torch import nn

    from slm_plugin.session import Session


def repair_layers(
    recovery: Recovery,
    session: Session,
    places: Sequence[int],
    repair: Callable[[FittedLayer, Write], list[str]],
    former: Sequence[nn.Module] | None = None,
) -> RecoveryRecord:
    """Repair layers from the bottom up, each on the outputs of the repaired ones below it.

    Args:
        recovery: The recovery, for messages and the record.
        session: The session, its model changed in place.
        places: Positions to repair, in ascending order.
        repair: Changes a layer and returns notes about it.
        former: The layers that give the targets, in place of the dense model's states.

    Raises:
        CalibrationError: The session has no reference.
        UnsupportedModelError: The residual stream and the reference differ in width.
        NumericalError: NaN or infinity; the model keeps its former weights.
    """
    reference = reference_of(session, recovery.name)
    notes = list(note_below(session))
    if not places:
        notes.append(NOTHING_MISSING)
    else:
        walk = LayerWalk(session.view, reference, session.sources, former)
        with rewriting() as write:
            for position in track(range(places[-1] + 1), f"{recovery.name}: layers"):
                if position in places:
                    notes += repair(walk.fitted, write)
                walk.advance()
    return RecoveryRecord(
        recovery=recovery.name, options=recovery.options.model_dump(), notes=tuple(notes)
    )
