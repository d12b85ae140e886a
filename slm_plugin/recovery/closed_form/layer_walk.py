"""A layer-by-layer pass through the pruned model, beside the recorded states of the dense one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_plugin.calibration.captures import Batch, enter, in_float64, run_layers
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
from slm_plugin.recovery.closed_form.rewriting import Write, rewriting

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slm_plugin.models.families.family import Family
    from slm_plugin.session import Session


@dataclass(frozen=True, slots=True)
class LayerBatch:
    """The activations of one batch at one layer.

    Attributes:
        start: Index of the batch's first sample in the calibration set.
        features: Input of the linear map to fit, ``(samples, length, features)``: the input of a
            projection, or the residual stream itself.
        output: The residual stream after the layer, ``(samples, length, hidden)``.
        target: The dense model's residual stream there, ``(samples, length, hidden)``.
    """

    start: int
    features: Tensor
    output: Tensor
    target: Tensor

    @property
    def residual(self) -> Tensor:
        """Target minus output, ``(samples, length, hidden)``, in float64."""
        return in_float64(self.target) - in_float64(self.output)


class LayerWalk:
    """Runs one layer after another on the reference's samples, with the present weights.

    One batch is in memory at a time; the inputs of the others are on disk. All samples have the
    same length and no padding, so every token counts.

    Args:
        session: The session. Layers that the walk has passed must not change any more.
        reference: The layer inputs of the dense model.
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
        """The next layer to run."""
        return self._session.view.layers[self.position]

    @property
    def projections(self) -> dict[str, nn.Linear]:
        """The linear maps of that layer by their short names."""
        return self._session.view.projections(self.layer)

    @property
    def multiplier(self) -> float:
        """Factor of what a block adds to the residual stream (Granite)."""
        return self._session.view.residual_multiplier

    @property
    def family(self) -> Family:
        """What is true of the model's class."""
        return self._session.view.family

    def norm_behind(self, name: str) -> nn.Module | None:
        """The norm between a projection's output and the residual stream, where there is one."""
        if not self.family.norm_behind:
            return None
        attention, mlp = self.family.writers
        return self.layer.get_submodule(attention if name == "o_proj" else mlp)

    def batches(self, projection: nn.Module) -> Iterator[LayerBatch]:
        """Run the layer on every batch, and record the input of one of its projections."""
        seen: list[Tensor] = []
        hook = projection.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        target, start = target_of(self._session, self.position), 0
        try:
            for batch, output in zip(self._reference, self._outputs(), strict=True):
                # OPT hands the tokens of all samples to its MLP as one list.
                features = seen.pop().reshape(*output.shape[:-1], -1)
                yield LayerBatch(start, features, output, batch.inputs[target])
                start += len(output)
        finally:
            hook.remove()

    def advance(self) -> None:
        """Run the layer and move to the next one."""
        self._store(self._outputs())
        self.position += 1

    def visit(self, places: Sequence[int], label: str) -> Iterator[int]:
        """Advance to each of the ascending places, the first of which may be EMBEDDING."""
        for position in track(range(EMBEDDING, max(places, default=EMBEDDING - 1) + 1), label):
            if position != EMBEDDING:
                self.advance()
            if position in places:
                yield position

    def inputs(self) -> Iterator[LayerBatch]:
        """The next layer's input for every batch, with its target."""
        target, start = target_of(self._session, self.position - 1), 0
        for state, batch in zip(self._states, self._reference, strict=True):
            yield LayerBatch(start, state, state, batch.inputs[target])
            start += len(state)

    def transform(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the next layer's input."""
        self._store(change(state) for state in self._states)

    def _store(self, states: Iterator[Tensor]) -> None:
        stored = Spool()
        for state in states:
            stored.append(state)
        self._states = stored

    def _outputs(self) -> Iterator[Tensor]:
        # A merged layer keeps the attention type of its lowest original layer.
        index = self._session.sources[self.position][0]
        for batch, state in zip(self._reference, self._states, strict=True):
            yield run_layers([self.layer], state, batch.arguments[index])


def repair_layers(
    recovery: Recovery,
    session: Session,
    places: Sequence[int],
    repair: Callable[[LayerWalk, Write], list[str]],
) -> RecoveryRecord:
    """Repair layers from the bottom up, each on the outputs of the repaired ones below it.

    Args:
        recovery: The recovery, for messages and the record.
        session: The session, its model changed in place.
        places: Positions to repair, in ascending order.
        repair: Changes the next layer of a walk and returns notes about it.

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
        walk = LayerWalk(session, reference)
        with rewriting() as write:
            for position in track(range(places[-1] + 1), f"{recovery.name}: layers"):
                if position in places:
                    notes += repair(walk, write)
                walk.advance()
    return RecoveryRecord(
        recovery=recovery.name, options=recovery.options.model_dump(), notes=tuple(notes)
    )
