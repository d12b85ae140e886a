"""The layers that a search has left, each gap repaired, with what every layer then sees.

Nothing of the model changes: a repaired layer is a copy that shares all parameters but those that a
fit writes. States are computed when they are first asked for, and kept on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from copy import copy
from dataclasses import replace
from functools import partial
from itertools import pairwise
from operator import mul
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

from slm_plugin.calibration.captures import in_float64, run_batches, run_layers
from slm_plugin.calibration.spool import Spool
from slm_plugin.lazy import nn, no_grad
from slm_plugin.models.operators import with_state
from slm_plugin.pruners.depth.search.judged_samples import Part, unfitted
from slm_plugin.pruners.depth.search.runs import DROP, Run
from slm_plugin.restoration.boundaries import dense_states, place_name, target_above
from slm_plugin.restoration.folding import fold_layer, folding
from slm_plugin.restoration.layer_walk import FittedLayer, LayerBatch, LayerRun
from slm_plugin.restoration.least_squares import share
from slm_plugin.restoration.refitting import refit_layer
from slm_plugin.restoration.rescaling import Gap, measured_gap
from slm_plugin.restoration.rewriting import Write, rewriting
from slm_plugin.surgery.layers import made_layer
from slm_plugin.surgery.merge_rules import refittable, share_parameters

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session


# Gives a repaired copy of a layer.
Repair: TypeAlias = "Callable[[FittedLayer], nn.Module]"


def _fitted_by(fit: Callable[[FittedLayer, Write], list[str]]) -> Repair:
    """A repair that writes the weights of `down_proj`."""

    def repair(fitted: FittedLayer) -> nn.Module:
        made = refittable(fitted.layer, fitted.family)
        with rewriting() as write:
            fit(replace(fitted, layer=made), write)
        return made

    return repair


def _rescaled(fitted: FittedLayer) -> nn.Module:
    """A layer whose outputs are multiplied by the factor of its gap.

    `recover: rescale` scales the weights below the gap instead, whose norms cancel the factor, and
    so passes on the same state.
    """
    scale = partial(mul, _measured(fitted).factor)
    made = share_parameters(fitted.layer)
    made.register_forward_hook(lambda layer, given, output: with_state(output, scale))
    return made


def _measured(fitted: FittedLayer) -> Gap:
    return measured_gap(fitted.batches(fitted.projections["down_proj"]), fitted.name)


# Those that are fitted to samples, each with as many numbers as a matrix has.
FITS: dict[str, Repair] = {
    "boundary": _fitted_by(partial(refit_layer, o_proj=False)),
    "fold_linear": _fitted_by(fold_layer),
}
REPAIRS: dict[str, Repair] = {**FITS, "rescale": _rescaled}


class Candidate(NamedTuple):
    """One more run to drop or merge.

    Attributes:
        run: The layers of the model, and what becomes of them.
        at: Position in the stack of the lowest layer that is replaced: the one below a dropped
            layer, which is repaired, or the lower one of two that merge.
        replaced: Number of layers that are replaced; 1 where the lowest layer of all is dropped.
    """

    run: Run
    at: int
    replaced: int = 2

    @property
    def is_lowest(self) -> bool:
        """Whether it drops the lowest layer, so that no layer can be repaired."""
        return self.replaced == 1


class RepairedStack:
    """The remaining layers, and their inputs on the calibration set.

    Attributes:
        layers: The remaining layers with their repairs.
        spans: For each of them, the lowest and the highest layer of the model in it.

    Args:
        session: Holds the model, its calibration set and the states to repair toward.
        repair: Name of the repair at every gap, one of `REPAIRS`, or none.
    """

    def __init__(self, session: Session, repair: str) -> None:
        self._view, self._captured = session.view, session.captured()
        self._dense, self._sources = dense_states(session)
        self._dimensions = self._view.dimensions()
        self._repair, self._fits = REPAIRS.get(repair), repair in FITS
        self._rescales = repair == "rescale"
        self._unfitted = unfitted(self._captured, fitted=self._fits)
        # As the model and its merge rules give them, and with their repairs.
        self._plain: list[nn.Module] = list(self._view.layers)
        self.layers = list(self._plain)
        self.spans = [(index, index) for index in range(len(self.layers))]
        # Inputs by position, a tensor for every batch. Up to the lowest change they are captured.
        self._inputs: dict[int, Spool] = {}
        self._lowest = len(self.layers)
        # What the states that enter the lowest layer are multiplied by, where it was rescaled.
        self._entering = 1.0

    @no_grad
    def lack(self, candidate: Candidate) -> float:
        """Relative error of the state behind a run that is dropped or merged.

        It is that of the `unfitted` samples. Where a repair is fitted it is the error after the
        best linear map of what the MLP adds, whatever the fit: this one has ``hidden x hidden``
        sums, where one of ``down_proj`` has ``channels x channels``. Where the lowest layer is
        dropped, there is nothing to fit; the states that enter may be rescaled.

        Raises:
            CalibrationError: There are fewer than 2 samples.
            NumericalError: Activations are NaN or infinite.
        """
        layer, at = self._plain_layer(candidate), candidate.at
        if layer is None and self._rescales:
            return self._entry(candidate).after
        if self._repair is None or layer is None:
            return self._error(candidate, layer)
        # The layer below a dropped one runs here as it is; its outputs are the inputs of the next.
        outputs = None if candidate.run.rule != DROP or self._has_inputs(at + 1) else Spool()
        fitted = self._fitted(at, candidate.replaced, layer)
        if outputs is not None and layer is self.layers[at]:
            fitted = replace(fitted, keep=outputs.append)
            self._inputs[at + 1] = outputs
        return folding(fitted).solve().after if self._fits else _measured(fitted).after

    @no_grad
    def lack_now(self, candidate: Candidate) -> float:
        """Relative error of the state at the place of `lack`, before the candidate goes."""
        above = candidate.at + candidate.replaced
        return self._error_of(partial(self._input, above), above)

    def repaired(self, candidate: Candidate) -> nn.Module | None:
        """The layer that takes the place of those of a candidate, repaired.

        None where the lowest layer is dropped.

        Raises:
            CalibrationError: There are fewer than 2 samples.
            NumericalError: Activations are NaN or infinite.
        """
        layer = self._plain_layer(candidate)
        return (
            None if layer is None else self.repaired_layer(candidate.at, candidate.replaced, layer)
        )

    @no_grad
    def repaired_layer(self, at: int, count: int, layer: nn.Module) -> nn.Module:
        """A repaired copy of a layer that takes the place of some.

        Args:
            at: Position of the lowest of them.
            count: How many.
            layer: The layer, which stays as it is.

        Raises:
            CalibrationError: There are fewer than 2 samples.
            NumericalError: Activations are NaN or infinite.
        """
        return layer if self._repair is None else self._repair(self._fitted(at, count, layer))

    @no_grad
    def final(self, candidate: Candidate, layer: nn.Module | None, part: Part) -> Tensor:
        """Hidden states behind the final norm for some samples, with a candidate carried out.

        Args:
            candidate: The candidate.
            layer: What `repaired` gave for it.
            part: The samples.
        """
        start = candidate.at
        layers = self._numbered(start + candidate.replaced)
        if layer is None:
            entering = self._captured[part.number].inputs[0][part.rows]
            return self._through(layers, entering * self._entering_without(candidate), part)
        if layer is self.layers[start]:
            start += 1
        else:
            layers.insert(0, (self.spans[start][0], layer))
        return self._through(layers, self._input(start, part.number)[part.rows], part)

    @no_grad
    def outputs(self, part: Part) -> Tensor:
        """Hidden states behind the final norm for some samples, of the layers as they are."""
        start = max([self._lowest, *self._inputs])
        inputs = self._input(start, part.number)[part.rows]
        return self._through(self._numbered(start), inputs, part)

    @no_grad
    def without(self, dropped: Collection[int]) -> RepairedStack:
        """A stack that drops these layers of the model and no others, every gap repaired.

        Here nothing but whole layers is dropped. What lies below the first difference is shared.
        """
        every = range(len(self._view.layers))
        kept = {first for first, _ in self.spans}
        changed = min(kept.symmetric_difference(every).symmetric_difference(dropped), default=None)
        if changed is None:
            return self
        # The layer below is repaired for another gap.
        first = max((index for index in kept if index < changed), default=0)
        made = self._restored(first)
        left = [index for index in every[first:] if index not in dropped]
        for index in range(first, left[0]):
            made.commit(Candidate(Run(index, index, DROP), 0, replaced=1), None)
        lowest = len(made.spans) - len(every[left[0] :])
        for at, (low, high) in enumerate(pairwise([*left, len(every)]), lowest):
            if high > low + 1:
                gap = Candidate(Run(low + 1, high - 1, DROP), at, replaced=high - low)
                made.commit(gap, made.repaired(gap))
        return made

    def _restored(self, first: int) -> RepairedStack:
        """A stack that has every layer of the model from one on, and below it those that are here.

        Args:
            first: A layer that is here; or 0, for all layers.
        """
        place = sum(lowest < first for lowest, _ in self.spans)
        if place > self._lowest and not self._has_inputs(place):
            self._input(place, 0)
        made = copy(self)
        every = list(self._view.layers)
        made.spans = [*self.spans[:place], *((index, index) for index in range(first, len(every)))]
        made._plain = [*self._plain[:place], *every[first:]]
        made.layers = [*self.layers[:place], *every[first:]]
        made._inputs = {p: states for p, states in self._inputs.items() if p <= place}
        if not first:
            made._entering = 1.0
        if place == first <= self._lowest:
            made._lowest = len(every)
        return made

    def _through(
        self, layers: Iterable[tuple[int, nn.Module]], inputs: Tensor, part: Part
    ) -> Tensor:
        """Hidden states behind the final norm, from the inputs of the lowest of some layers."""
        (outputs,) = run_batches(layers, [part.batch], [inputs])
        final: Tensor = self._view.norm(outputs)
        return final

    def commit(self, candidate: Candidate, layer: nn.Module | None) -> None:
        """Carry a candidate out, and repair the gaps above anew, since their inputs change.

        Args:
            candidate: The candidate.
            layer: What `repaired` gave for it.
        """
        run, at, count = candidate
        if layer is None:
            self._entering = self._entering_without(candidate)
        plain = self._plain_layer(candidate)
        span = self.spans[at] if run.rule == DROP else (run.first, run.last)
        kept = slice(at, at + count)
        self.spans[kept] = [] if layer is None else [span]
        self._plain[kept] = [] if plain is None else [plain]
        self.layers[kept] = [] if layer is None else [layer]
        self._inputs = {p: states for p, states in self._inputs.items() if p <= at}
        self._lowest = min(self._lowest, at)
        for position in range(at if layer is None else at + 1, len(self.spans)):
            if self._plain[position] is not self.layers[position]:
                self.layers[position] = self.repaired_layer(position, 1, self._plain[position])

    def _plain_layer(self, candidate: Candidate) -> nn.Module | None:
        """The layer that takes the place of those of a candidate, before its repair."""
        run = candidate.run
        if candidate.is_lowest:
            return None
        if run.rule == DROP:
            return self._plain[candidate.at]
        merged = list(self._view.layers)[run.first : run.last + 1]
        return made_layer(run.operation, merged, self._dimensions)

    def _fitted(self, at: int, count: int, layer: nn.Module) -> FittedLayer:
        """A layer in place of some, beside the state that should be behind it."""
        first, target = self.spans[at][0], self._target(at + count)

        def runs() -> Iterator[LayerRun]:
            for number, batch in enumerate(self._captured):
                yield self._input(at, number), batch.arguments[first]

        def targets() -> Iterator[Tensor]:
            return (batch.inputs[target] for batch in self._dense)

        return FittedLayer(f"layer {first}", layer, self._view, runs, targets)

    def _entry(self, candidate: Candidate) -> Gap:
        """The gap between the embedding and the layer above the lowest, which a candidate drops."""
        target = self._target(candidate.at + candidate.replaced)
        states = (batch.inputs[0] for batch in self._captured)
        wanted = (batch.inputs[target] for batch in self._dense)
        pairs = zip(states, wanted, strict=True)
        return measured_gap((LayerBatch(0, s, s, w) for s, w in pairs), place_name(-1))

    def _entering_without(self, candidate: Candidate) -> float:
        """The factor of the states that enter, once a candidate has dropped the lowest layer."""
        return self._entry(candidate).factor if self._rescales else 1.0

    def _target(self, above: int) -> int:
        """Index of the dense state that the layer at a position should see."""
        sources = [self._sources[lowest] for lowest, _ in self.spans]
        return target_above(sources, above - 1, len(self._dense[0].inputs) - 1)

    def _error(self, candidate: Candidate, layer: nn.Module | None) -> float:
        """Relative error of the state behind a candidate as it is."""
        at = candidate.at

        def state(number: int) -> Tensor:
            if layer is None:
                return self._input(at, number)
            if layer is self.layers[at]:
                return self._input(at + 1, number)
            arguments = self._captured[number].arguments[self.spans[at][0]]
            return run_layers([layer], self._input(at, number), arguments)

        return self._error_of(state, at + candidate.replaced)

    def _error_of(self, state_of: Callable[[int], Tensor], above: int) -> float:
        """Relative error of the states of all batches, as those that enter a position."""
        target = self._target(above)
        error = norm = 0.0
        for number, rows in self._unfitted.items():
            state = state_of(number)
            wanted = in_float64(self._dense[number].inputs[target][rows])
            error += float((wanted - in_float64(state[rows])).square().sum())
            norm += float(wanted.square().sum())
        return share(error, norm)

    def _numbered(self, start: int) -> list[tuple[int, nn.Module]]:
        """The layers from a position on, each with the layer whose mask and positions it takes."""
        spans = self.spans[start:]
        return [
            (first, layer) for (first, _), layer in zip(spans, self.layers[start:], strict=True)
        ]

    def _has_inputs(self, position: int) -> bool:
        return position <= self._lowest or position in self._inputs

    def _input(self, position: int, number: int) -> Tensor:
        """Input of the layer at a position for one batch."""
        if position <= self._lowest:
            states = self._captured[number].inputs[position]
            return states if position or self._entering == 1.0 else states * self._entering
        if position not in self._inputs:
            ((index, layer),) = self._numbered(position - 1)[:1]
            below = [self._input(position - 1, n) for n in range(len(self._captured))]
            outputs = Spool()
            for hidden in run_batches([(index, layer)], self._captured, below):
                outputs.append(hidden)
            self._inputs[position] = outputs
        return self._inputs[position][number]
