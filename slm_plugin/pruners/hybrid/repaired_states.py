"""The final states of a planned model after its restoration, without changing the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slm_plugin.calibration.held_out import held_out
from slm_plugin.lazy import no_grad
from slm_plugin.plans import Operation
from slm_plugin.progress import track
from slm_plugin.restoration.boundaries import dense_states
from slm_plugin.restoration.layer_walk import LayerWalk
from slm_plugin.restoration.refitting import refit_layer
from slm_plugin.restoration.rewriting import rewriting
from slm_plugin.surgery.merge_rules import refittable
from slm_plugin.surgery.preview import planned_layers

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session


@no_grad
def repaired_states(session: Session, operations: tuple[Operation, ...]) -> list[Tensor]:
    """The held-out samples' final states that a plan and `recover: refit` would leave.

    One layer at a time is copied, cut and refitted on the outputs of those below it, as surgery and
    the recovery do. No fit uses the held-out samples.

    Args:
        session: Holds the model, which stays as it is, and the states to refit toward.
        operations: The operations of the plan: on layers, in layers, or both.

    Returns:
        Hidden states behind the final norm, ``(samples, length, hidden)``, of every batch that has
        held-out samples.

    Raises:
        CalibrationError: There are fewer than 2 samples.
        NumericalError: NaN or infinity.
    """
    view, planned = session.view, planned_layers(session.view, operations)
    dense, sources = dense_states(session)
    spans = [(sources[low][0], sources[high][1]) for low, high in planned.left]
    walk = LayerWalk(view, dense, spans)
    # The layer below a gap changes first.
    lowest = max(planned.lowest - 1, 0)
    layers = track(planned.made(0), "hybrid: layers", len(planned.left))
    for place, (_, layer) in enumerate(layers):
        walk.replacement = layer
        if place >= lowest:
            walk.replacement = refittable(layer, view.family)
            with rewriting() as write:
                refit_layer(walk.fitted, write, o_proj=False)
        walk.advance()
    return [view.norm(hidden) for hidden in held_out(batch.output for batch in walk.inputs())]
