"""A layer of the pruned model beside its target, and a walk from layer to layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeAlias

from slm_plugin.calibration.captures import Batch, enter, in_float64, projection_inputs, run_layers
from slm_plugin.calibration.spool import Spool
from slm_plugin.models.streaming import held
from slm_plugin.models.view import DecoderView
from slm_plugin.progress import track
from slm_plugin.restoration.boundaries import EMBEDDING, target_above

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slm_plugin.models.families.family import Family

# A layer's input, ``(samples, length, hidden)``, and its arguments.
LayerRun: TypeAlias = "tuple[Tensor, dict[str, Any]]"


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


@dataclass(frozen=True, slots=True)
class FittedLayer:
    """A layer to repair, on its present input and beside its target.

    Attributes:
        name: Its name in messages.
        layer: The layer.
        view: The model.
        runs: Gives its input and arguments for every batch.
        targets: Gives the target behind it for every batch, ``(samples, length, hidden)``.
        keep: Takes its output of every batch when `batches` runs it.
    """

    name: str
    layer: nn.Module
    view: DecoderView
    runs: Callable[[], Iterator[LayerRun]]
    targets: Callable[[], Iterator[Tensor]]
    keep: Callable[[Tensor], None] = field(default=lambda output: None)

    @property
    def projections(self) -> dict[str, nn.Linear]:
        """The linear maps of the layer by their short names."""
        return self.view.projections(self.layer)

    @property
    def multiplier(self) -> float:
        """Factor of what a block adds to the residual stream (Granite)."""
        return self.view.residual_multiplier

    @property
    def family(self) -> Family:
        """What is true of the model's class."""
        return self.view.family

    def norm_behind(self, name: str) -> nn.Module | None:
        """The norm between a projection's output and the residual stream, where there is one."""
        if not self.family.norm_behind:
            return None
        attention, mlp = self.family.writers
        return self.layer.get_submodule(attention if name == "o_proj" else mlp)

    def batches(self, projection: nn.Module) -> Iterator[LayerBatch]:
        """Run the layer on every batch, and record the input of one of its projections."""
        seen, start = projection_inputs(self.layer, projection, self.runs()), 0
        for (features, output), target in zip(seen, self.targets(), strict=True):
            self.keep(output)
            yield LayerBatch(start, features, output, target)
            start += len(output)


class LayerWalk:
    """Runs one layer after another on the reference's samples, with the present weights.

    One batch is in memory at a time; the inputs of the others are on disk. All samples have the
    same length and no padding, so every token counts.

    Args:
        view: The model. Layers that the walk has passed must not change any more.
        reference: The layer inputs of the dense model.
        sources: For every layer, the lowest and the highest layer of the reference in it.
        former: The layers as they were before a stage. Where given, the target of a layer is what
            the former one makes of the present input, and not the state of the reference.

    Attributes:
        position: Index of the next layer.
        replacement: Runs in place of the next layer; None for the layer itself.
    """

    def __init__(
        self,
        view: DecoderView,
        reference: Sequence[Batch],
        sources: Sequence[tuple[int, int]],
        former: Sequence[nn.Module] | None = None,
    ) -> None:
        self._view, self._reference, self._sources = view, reference, sources
        self._former = former
        self._states = Spool()
        self.position = 0
        self.replacement: nn.Module | None = None
        for batch in reference:
            self._states.append(enter(view, batch.tokens)[0])

    @property
    def layer(self) -> nn.Module:
        """The next layer to run."""
        if self.replacement is not None:
            return self.replacement
        return self._view.layers[self.position]

    @property
    def count(self) -> int:
        """Number of batches."""
        return len(self._reference)

    @property
    def fitted(self) -> FittedLayer:
        """That layer, on its present input and beside its target."""
        name = f"layer {self.position}"
        return FittedLayer(name, self.layer, self._view, self.runs, self._targets)

    def runs(self) -> Iterator[LayerRun]:
        """The next layer's input and arguments for every batch."""
        # A merged layer keeps the attention type of its lowest original layer.
        index = self._sources[self.position][0]
        for batch, state in zip(self._reference, self._states, strict=True):
            yield state, batch.arguments[index]

    def _targets(self) -> Iterator[Tensor]:
        """The target of every batch behind the next layer, ``(samples, length, hidden)``."""
        if self._former is None:
            target = self._target(self.position)
            yield from (batch.inputs[target] for batch in self._reference)
            return
        former = self._former[self.position]
        with held(former):
            yield from (run_layers([former], *run) for run in self.runs())

    def _target(self, position: int) -> int:
        """Index, in the inputs of a reference batch, of the target state after a layer."""
        return target_above(self._sources, position, len(self._reference[0].inputs) - 1)

    def advance(self) -> None:
        """Run the layer and move to the next one."""
        self._store(run_layers([self.layer], *run) for run in self.runs())
        self.position += 1
        self.replacement = None

    def visit(self, places: Sequence[int], label: str) -> Iterator[int]:
        """Advance to each of the ascending places, the first of which may be EMBEDDING."""
        for position in track(range(EMBEDDING, max(places, default=EMBEDDING - 1) + 1), label):
            if position != EMBEDDING:
                self.advance()
            if position in places:
                yield position

    def inputs(self) -> Iterator[LayerBatch]:
        """The next layer's input for every batch, with its target."""
        target, start = self._target(self.position - 1), 0
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
