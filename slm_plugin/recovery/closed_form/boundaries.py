"""Where a pruned model lacks layers, and what the state there should be.

A position is that of a layer in the present model; the state at a position is the residual stream
behind it.
"""

from __future__ import annotations

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
    """What the layers saw before the first stage.

    Args:
        session: The session.
        recovery: Name of the recovery, for messages.

    Raises:
        CalibrationError: It was not kept, or not of the model as it was loaded.
        UnsupportedModelError: The residual stream has another width now, or operators in it.
    """
    reference = session.reference
    if not reference:
        raise CalibrationError(
            f"{recovery} needs to know what the model computed before it was pruned",
            hint="call `session.keep_reference()` before the first stage",
        )
    first = reference[0].inputs
    if len(first) != session.original.layers + 1:
        raise CalibrationError(
            f"the reference that {recovery} needs was kept of a model of {len(first) - 1} layers; "
            f"{session.original.layers} were loaded",
            hint="call `session.keep_reference()` before the first stage",
        )
    width, now = first[0].shape[-1], session.view.embedding.embedding_dim
    if width != now:
        raise UnsupportedModelError(
            f"{recovery} compares states of {width} features with states of {now}",
            hint="it follows stages that leave the hidden size as it is",
        )
    if operators(session.model):
        raise UnsupportedModelError(
            f"{recovery} cannot repair behind operators, which stand between layers already",
            hint="leave one of the two recoveries out",
        )
    return reference


def target_of(session: Session, position: int) -> int:
    """Index, in the inputs of a reference batch, of the state that is wanted behind a layer.

    That is what the next layer that stayed once saw or, behind the top layer, the final state
    before the norm.
    """
    above = session.sources[position + 1 :]
    return above[0][0] if above else session.original.layers


def boundaries(session: Session) -> list[int]:
    """Positions behind which layers are missing, or whose layer is merged of several."""
    found = []
    for position, (first, last) in enumerate(session.sources):
        if first != last or target_of(session, position) != last + 1:
            found.append(position)
    return found


def gaps(session: Session) -> list[int]:
    """The boundaries, and EMBEDDING before them when layers are missing at the bottom."""
    return [EMBEDDING] * bool(missing_below(session)) + boundaries(session)


def place_name(position: int) -> str:
    """What messages call a position."""
    return "the embedding" if position == EMBEDDING else f"layer {position}"


def missing_below(session: Session) -> int:
    """How many layers are missing below the lowest one."""
    return session.sources[0][0]


def note_below(session: Session) -> tuple[str, ...]:
    """What there is to say of layers that are missing below the lowest one."""
    gone = missing_below(session)
    if not gone:
        return ()
    which = "layer 0 is" if gone == 1 else f"layers 0 to {gone - 1} are"
    return (f"{which} missing at the bottom, where no layer stands before them to take a repair",)
