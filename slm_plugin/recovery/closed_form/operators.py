"""Insert operators at the gaps of a pruned model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

from slm_plugin.errors import NumericalError
from slm_plugin.lazy import torch
from slm_plugin.models.operators import put_operator
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.restoration.boundaries import (
    EMBEDDING,
    NOTHING_MISSING,
    gaps,
    place_name,
    reference_of,
)
from slm_plugin.restoration.layer_walk import LayerBatch, LayerWalk

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session

# Takes a function that yields the batches at a gap, and the gap's name. Returns the matrix, float64
# (states are rows to its left), or None to leave the gap unchanged, and a note.
Find: TypeAlias = "Callable[[Callable[[], Iterable[LayerBatch]], str], tuple[Tensor | None, str]]"


def put_operators(recovery: Recovery, session: Session, find: Find) -> RecoveryRecord:
    """Compute an operator for every gap from the bottom up, with the lower gaps repaired.

    The model changes only after all operators are computed.

    Args:
        recovery: The recovery, for messages and the record.
        session: The session, its model changed in place.
        find: Computes one operator.

    Raises:
        CalibrationError: The session has no reference, or it has too few samples.
        UnsupportedModelError: The residual stream and the reference differ in width, or the
            model has operators already.
        NumericalError: NaN or infinity.
    """
    reference = reference_of(session, recovery.name)
    places = gaps(session)
    notes = [] if places else [NOTHING_MISSING]
    found: dict[int, Tensor] = {}
    walk = LayerWalk(session.view, reference, session.sources)
    for position in walk.visit(places, f"{recovery.name}: layers"):
        where = place_name(position)
        matrix, note = find(walk.inputs, where)
        notes.append(f"{where}: {note}")
        if matrix is not None:
            found[position] = matrix = _representable(matrix, session, where)
            walk.transform(matrix.__rmatmul__)
    for position, matrix in found.items():
        view = session.view
        put_operator(view.embedding if position == EMBEDDING else view.layers[position], matrix)
    if found:
        width = session.view.embedding.embedding_dim
        notes.append(
            f"operators added: {len(found)} of {width} x {width}; only the onnx export stores them"
        )
    return RecoveryRecord(
        recovery=recovery.name, options=recovery.options.model_dump(), notes=tuple(notes)
    )


def _representable(matrix: Tensor, session: Session, where: str) -> Tensor:
    """The matrix in the model's number format."""
    fitting = matrix.to(session.model.device, session.model.dtype)
    if not torch.isfinite(fitting).all():
        raise NumericalError(
            f"the operator behind {where} is NaN or does not fit {str(fitting.dtype)[6:]}",
            hint="load the model in float32 or bfloat16 and check its weights",
        )
    return fitting
