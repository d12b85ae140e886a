"""Operators at the gaps of a pruned model: one way to put them there, many to find them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

from slm_plugin.errors import NumericalError
from slm_plugin.lazy import torch
from slm_plugin.models.operators import put_operator
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.recovery.closed_form.boundaries import (
    EMBEDDING,
    NOTHING_MISSING,
    gaps,
    place_name,
    reference_of,
)
from slm_plugin.recovery.closed_form.layer_walk import Ascent, Sight

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session

# Given what is seen at a gap, as often as it is asked for, and the gap's name: the matrix, float64
# (states are rows to the left of it), or None where the stream is best left alone, and a note.
Find: TypeAlias = "Callable[[Callable[[], Iterable[Sight]], str], tuple[Tensor | None, str]]"


def put_operators(recovery: Recovery, session: Session, find: Find) -> RecoveryRecord:
    """Find an operator for every gap from the bottom up, each on the stream as mended below it.

    The model is changed when all of them are found.

    Args:
        recovery: Who repairs.
        session: The session, its model changed in place.
        find: How an operator is found.

    Raises:
        CalibrationError: No reference was kept, or it has too few samples.
        UnsupportedModelError: The residual stream has another width than the reference's, or has
            operators already.
        NumericalError: NaN or infinity.
    """
    reference = reference_of(session, recovery.name)
    places = gaps(session)
    notes = [] if places else [NOTHING_MISSING]
    found: dict[int, Tensor] = {}
    ascent = Ascent(session, reference)
    for position in ascent.visit(places, f"{recovery.name}: layers"):
        where = place_name(position)
        matrix, note = find(ascent.arrived, where)
        notes.append(f"{where}: {note}")
        if matrix is not None:
            found[position] = matrix = _representable(matrix, session, where)
            ascent.transform(matrix.__rmatmul__)
    for position, matrix in found.items():
        view = session.view
        put_operator(view.embedding if position == EMBEDDING else view.layers[position], matrix)
    if found:
        width = session.view.embedding.embedding_dim
        notes.append(f"operators added: {len(found)} of {width} x {width}; only ONNX holds them")
    return RecoveryRecord(
        recovery=recovery.name, options=recovery.options.model_dump(), notes=tuple(notes)
    )


def _representable(matrix: Tensor, session: Session, where: str) -> Tensor:
    """The matrix in the model's number format, as it will multiply."""
    fitting = matrix.to(session.model.device, session.model.dtype)
    if not torch.isfinite(fitting).all():
        raise NumericalError(
            f"the operator behind {where} is NaN or does not fit {str(fitting.dtype)[6:]}",
            hint="load the model in float32 or bfloat16 and check its weights",
        )
    return fitting
