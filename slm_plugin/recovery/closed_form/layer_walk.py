"""The pruned model from the bottom up, layer by layer, beside what the dense one once computed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_plugin.calibration.captures import Batch, enter, run_layers
from slm_plugin.calibration.spool import Spool
from slm_plugin.progress import track
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.recovery.closed_form.boundaries import (
    EMBEDDING,
    NOTHING_MISSING,
    note_below,
    reference_of,
    target_of,
)
from slm_plugin.recovery.closed_form.least_squares import in_float64
from slm_plugin.recovery.closed_form.rewriting import Write, rewriting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slm_plugin.session import Session


@dataclass(frozen=True, slots=True)
class Sight:
    """What is seen of one batch at one layer.

    Attributes:
        start: Index of the batch's first sample among all.
        inner: What is to be multiplied anew, ``(samples, length, features)``: what the watched
            projection sees, or the output itself.
        output: What the layer makes of its present input, ``(samples, length, hidden)``.
        target: What should stand there, ``(samples, length, hidden)``.
    """

    start: int
    inner: Tensor
    output: Tensor
    target: Tensor

    @property
    def lack(self) -> Tensor:
        """What the output should have more, ``(samples, length, hidden)``, in float64."""
        return in_float64(self.target) - in_float64(self.output)


class Ascent:
    """Runs one layer after the other on the reference's samples, with the weights as they are.

    One batch is in memory at a time; what the present layer sees of the others lies on disk.
    Samples have one length and no padding, so that every token counts.

    Args:
        session: The session; the layers that are passed already must not change any more.
        reference: What the layers saw before the first stage.
    """

    def __init__(self, session: Session, reference: Sequence[Batch]) -> None:
        self._session = session
        self._reference = reference
        self._states = Spool()
        self.position = 0
        for batch in reference:
            self._states.append(enter(session.view, batch.tokens)[0])

    @property
    def layer(self) -> nn.Module:
        """The layer that is next."""
        return self._session.view.layers[self.position]

    def look(self, projection: nn.Module) -> Iterator[Sight]:
        """Run the layer on every batch, and watch what one of its projections sees."""
        seen: list[Tensor] = []
        hook = projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        target, start = target_of(self._session, self.position), 0
        try:
            for batch, output in zip(self._reference, self._outputs(), strict=True):
                yield Sight(start, seen.pop(), output, batch.inputs[target])
                start += len(output)
        finally:
            hook.remove()

    def climb(self) -> None:
        """Go on to the next layer."""
        self._keep(self._outputs())
        self.position += 1

    def visit(self, places: Sequence[int], label: str) -> Iterator[int]:
        """Climb until each place, from EMBEDDING up and ascending, is the last one passed."""
        for position in track(range(EMBEDDING, max(places, default=EMBEDDING - 1) + 1), label):
            if position != EMBEDDING:
                self.climb()
            if position in places:
                yield position

    def arrived(self) -> Iterator[Sight]:
        """What the next layer sees of every batch, and what should stand there."""
        target, start = target_of(self._session, self.position - 1), 0
        for state, batch in zip(self._states, self._reference, strict=True):
            yield Sight(start, state, state, batch.inputs[target])
            start += len(state)

    def transform(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change what the next layer sees."""
        self._keep(change(state) for state in self._states)

    def _keep(self, states: Iterator[Tensor]) -> None:
        kept = Spool()
        for state in states:
            kept.append(state)
        self._states = kept

    def _outputs(self) -> Iterator[Tensor]:
        # A layer keeps the kind of attention of the lowest layer that it is made of.
        index = self._session.sources[self.position][0]
        for batch, state in zip(self._reference, self._states, strict=True):
            yield run_layers([self.layer], state, batch.arguments[index])


def repair_upwards(
    recovery: Recovery,
    session: Session,
    places: Sequence[int],
    repair: Callable[[Ascent, Write], list[str]],
) -> RecoveryRecord:
    """Repair layers from the bottom up, each on what the repaired ones below it compute.

    Args:
        recovery: Who repairs.
        session: The session, its model changed in place.
        places: Positions to repair, in ascending order.
        repair: Changes the layer that an ascent has come to, and tells how it went.

    Raises:
        CalibrationError: No reference was kept.
        UnsupportedModelError: The residual stream has another width than the reference's.
        NumericalError: NaN or infinity; the model keeps its former weights.
    """
    reference = reference_of(session, recovery.name)
    notes = list(note_below(session))
    if not places:
        notes.append(NOTHING_MISSING)
    else:
        ascent = Ascent(session, reference)
        with rewriting() as write:
            for position in track(range(places[-1] + 1), f"{recovery.name}: layers"):
                if position in places:
                    notes += repair(ascent, write)
                ascent.climb()
    return RecoveryRecord(
        recovery=recovery.name, options=recovery.options.model_dump(), notes=tuple(notes)
    )
