"""The boundaries where layers were removed, and the target state at each.

A position is the index of a layer in the present model. The state at a position is the residual
stream after that layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_plugin.errors import CalibrationError, UnsupportedModelError
from slm_plugin.models.operators import operators

if TYPE_CHECKING:
    from slm_plugin.calibration.captures import Batch
    from slm_plugin.session import Session

# The position of the embedding, below that of layer 0.
EMBEDDING = -1
NOTHING_MISSING = "no layer is missing: nothing to repair"


def reference_of(session: Session, recovery: str) -> list[Batch]:
    """The layer inputs of the dense model, recorded before the first stage.

    Args:
        session: The session.
        recovery: Name of the recovery, for messages.

    Raises:
        CalibrationError: There is none, or it was recorded after a stage.
        UnsupportedModelError: The hidden size changed, or the model has operators.
    """
    if operators(session.model):
        raise UnsupportedModelError(
            f"{recovery} cannot repair a model that has operators",
            hint="leave it out, or the stage that inserts them",
        )
    reference = session.reference
    if not reference:
        raise CalibrationError(
            f"{recovery} needs the hidden states of the model before pruning",
            hint="call `session.keep_reference()` before the first stage",
        )
    first = reference[0].inputs
    if len(first) != session.original.layers + 1:
        raise CalibrationError(
            f"the reference that {recovery} needs was recorded with {len(first) - 1} layers; "
            f"the model was loaded with {session.original.layers}",
            hint="call `session.keep_reference()` before the first stage",
        )
    width, now = first[0].shape[-1], session.view.embedding.embedding_dim
    if width != now:
        raise UnsupportedModelError(
            f"{recovery} cannot compare states of {width} features with states of {now}",
            hint="use it after stages that keep the hidden size",
        )
    return reference


def dense_states(session: Session) -> tuple[list[Batch], tuple[tuple[int, int], ...]]:
    """The states toward which a repair after this stage fits, and where each layer stands in them.

    They are the reference, or the present model's where none was recorded.

    Returns:
        The layer inputs, and for every present layer the lowest and the highest layer in it.
    """
    if session.reference is not None:
        return session.reference, session.sources
    return session.captured(), tuple((i, i) for i in range(len(session.view.layers)))


def target_of(session: Session, position: int) -> int:
    """Index, in the inputs of a reference batch, of the target state after a layer."""
    return target_above(session.sources, position, session.original.layers)


def target_above(sources: Sequence[tuple[int, int]], position: int, top: int) -> int:
    """Index of the target state after a layer.

    It is the input of the next remaining layer in the dense model or, after the top layer, the
    final state before the norm.

    Args:
        sources: For every remaining layer, the lowest and the highest dense layer in it.
        position: The layer.
        top: Number of layers of the dense model.
    """
    above = sources[position + 1 :]
    return above[0][0] if above else top


def boundaries(session: Session) -> list[int]:
    """Positions after which layers are missing, or whose layer replaces several."""
    found = []
    for position, (first, last) in enumerate(session.sources):
        if first != last or target_of(session, position) != last + 1:
            found.append(position)
    return found


def gaps(session: Session) -> list[int]:
    """The boundaries, and EMBEDDING before them when layers are missing at the bottom."""
    return [EMBEDDING] * bool(missing_below(session)) + boundaries(session)


def place_name(position: int) -> str:
    """The name of a position in messages."""
    return "the embedding" if position == EMBEDDING else f"layer {position}"


def missing_below(session: Session) -> int:
    """How many layers are missing below the lowest one."""
    return session.sources[0][0]


def note_below(session: Session) -> tuple[str, ...]:
    """A note where layers below the lowest one are missing."""
    missing = missing_below(session)
    if not missing:
        return ()
    which = "layer 0 is" if missing == 1 else f"layers 0 to {missing - 1} are"
    return (f"{which} missing at the bottom, and no layer before them can be repaired",)
