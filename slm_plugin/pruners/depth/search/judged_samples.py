"""The samples on which trials are judged: those that no repair is fitted to.

On the others, trials whose repairs fit too closely would win.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from slm_plugin.calibration.captures import Batch, first_inputs
from slm_plugin.calibration.held_out import held_out_rows

if TYPE_CHECKING:
    from slm_plugin.session import Session


@dataclass(frozen=True, slots=True)
class Part:
    """The samples of a captured batch on which trials are judged.

    Attributes:
        number: The batch.
        rows: Their places in it.
        batch: They alone; where a repair is fitted it has no input but the first layer's.
    """

    number: int
    rows: Sequence[int] | slice
    batch: Batch


def unfitted(captured: Sequence[Batch], *, fitted: bool) -> dict[int, list[int] | slice]:
    """The samples that no repair is fitted to: those held out, or all where none is fitted.

    Returns:
        Their places, by the number of their batch.
    """
    if not fitted:
        return dict.fromkeys(range(len(captured)), slice(None))
    held = held_out_rows(batch.tokens for batch in captured)
    return {number: rows for number, (_, rows) in enumerate(held) if rows}


def judged_parts(session: Session, *, fitted: bool) -> list[Part]:
    """The `unfitted` samples, by batch."""
    captured = session.captured()
    found = unfitted(captured, fitted=fitted)
    if not fitted:
        return [Part(number, rows, captured[number]) for number, rows in found.items()]
    entered = first_inputs(
        session.view, (captured[number].tokens[rows] for number, rows in found.items())
    )
    return [
        Part(number, rows, replace(batch, final=captured[number].final[rows]))
        for (number, rows), batch in zip(found.items(), entered, strict=True)
    ]
