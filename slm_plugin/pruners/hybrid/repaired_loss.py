"""The loss of a planned model after its restoration, measured without changing the model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slm_plugin.calibration.held_out import is_held_out
from slm_plugin.lazy import no_grad, torch
from slm_plugin.models.head import next_token_losses
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
def repaired_losses(session: Session, operations: tuple[Operation, ...]) -> list[float]:
    """The losses that a plan and `recover: refit` would leave, on the held-out samples.

    One layer at a time is copied, cut and refitted on the outputs of those below it, as surgery and
    the recovery do. No fit uses the held-out samples.

    Args:
        session: Holds the model, which stays as it is, and the states to refit toward.
        operations: The operations of the plan: on layers, in layers, or both.

    Returns:
        Mean next-token cross-entropy of every held-out sample, in nats a token.

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
    return held_out_losses(session, [view.norm(batch.output) for batch in walk.inputs()])


@no_grad
def held_out_losses(session: Session, final: list[Tensor]) -> list[float]:
    """Mean next-token cross-entropy of every held-out sample, in nats a token.

    Args:
        session: Holds the model and its calibration set.
        final: Hidden states behind the final norm of every batch, ``(samples, length, hidden)``.
    """
    found: list[float] = []
    start = 0
    for batch, hidden in zip(session.captured(), final, strict=True):
        chosen = is_held_out(torch.arange(start, start + len(hidden)))
        start += len(hidden)
        if chosen.any():
            kept = chosen.to(hidden.device)
            losses = next_token_losses(session.view.logits, hidden[kept], batch.tokens[kept])
            found += losses.mean(-1).tolist()
    return found
