"""Trials: evaluate a criterion on the model with some runs of layers merged or dropped.

Nothing is copied. Layers below the lowest run are the original ones, so their captured outputs are
reused: only the merged layer, the layers above it and the final norm run. Logits are computed only
if the criterion needs them, and no trial is run twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import TYPE_CHECKING

from slm_plugin.cache import Store
from slm_plugin.calibration.captures import run_batches
from slm_plugin.calibration.spool import Spool
from slm_plugin.lazy import inference_mode, nn, torch
from slm_plugin.models.streaming import is_streamed
from slm_plugin.plans import Trial
from slm_plugin.progress import counting
from slm_plugin.pruners.depth.measures.criteria import CriterionName
from slm_plugin.pruners.depth.measures.similarity import Similarity
from slm_plugin.pruners.depth.search.journal import Journal, journal_of
from slm_plugin.pruners.depth.search.runs import DROP, Found, Measured, Run, Runs
from slm_plugin.pruners.influence import block_influence
from slm_plugin.pruners.trial_store import tell_read
from slm_plugin.surgery.layers import made_layer
from slm_plugin.surgery.merge_rules import candidates

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session


@contextmanager
def trials_of(
    session: Session, name: str, criterion: CriterionName, rule: str, *, weights_only: bool = False
) -> Iterator[Trials]:
    """Trials with a progress counter, stored in the session's journal.

    Args:
        session: Holds the layers and their captured inputs.
        name: Name of the strategy, for the progress display.
        criterion: Name of one of `criteria.CRITERIA`.
        rule: The merge rule, as a recipe names it, or `runs.DROP`.
        weights_only: See `plan.MergeLayers`.

    Raises:
        OutputError: The journal cannot be written.
    """
    journal = journal_of(session, criterion)
    tell_read(session, journal.read_from_disk, journal.store)
    with counting(f"{name}: trials") as count:
        yield Trials(
            session, criterion, rule, weights_only=weights_only, count=count, journal=journal
        )


class Trials:
    """Evaluates merges and drops on the captured calibration set; a `runs.Measure`.

    Attributes:
        greatest: Upper bound of all values.
        made: Every trial so far, by its run and the other runs, in order.

    Args:
        session: Holds the layers and their captured inputs.
        criterion: Name of one of `criteria.CRITERIA`.
        rule: The merge rule, as a recipe names it, or `runs.DROP`.
        weights_only: See `plan.MergeLayers`.
        count: Called for every trial that is run.
        journal: Where the values are stored.
    """

    def __init__(
        self,
        session: Session,
        criterion: CriterionName,
        rule: str,
        *,
        weights_only: bool = False,
        count: Callable[[], None] = lambda: None,
        journal: Journal | None = None,
    ) -> None:
        self._view = session.view
        self._dimensions = session.view.dimensions()
        self._captured = session.captured()
        self._similarity = Similarity(session.view, session.captured(), criterion)
        self._streamed = is_streamed(session.model)
        self._rule, self._weights_only = rule, weights_only
        self._count = count
        self._journal = journal or Journal(Store())
        self._merged: dict[Run, nn.Module] = {}
        self._base: Runs = ()
        self._inputs: list[tuple[dict[int, int], Spool]] = []
        self.greatest = self._similarity.greatest
        self.made: dict[tuple[Run, Runs], Measured] = {}

    @property
    def same(self) -> float:
        """Value of the unchanged model."""
        return self._similarity.same

    def __call__(
        self,
        first: int,
        last: int,
        rest: Runs,
        *,
        base: Runs = (),
        bound: float | None = None,
        rule: str | None = None,
    ) -> Measured:
        """Try to merge or drop one more run; see `runs.Measure`.

        Raises:
            NumericalError: A value is NaN.
        """
        bounds = [] if bound is None else [bound]
        found: list[Measured] = []
        for each in candidates(rule or self._rule, first, last, lambda: self._influences):
            run = Run(first, last, each, self._weights_only)
            # A window of one layer changes nothing.
            runs = tuple(sorted((run, *rest) if run.removed else rest))
            found.append(Measured(run, *self._value(runs, base, max(bounds, default=None))))
            if found[-1].samples is None:
                bounds.append(found[-1].value)
        best = max(found, key=lambda tried: (tried.samples is None, tried.value))
        self.made[best.run, rest] = best
        return best

    def others(self, found: Found) -> Iterator[Trial]:
        """The trials that are not part of a search's result."""
        chosen = {(t.first, t.last, t.rule, t.committed) for t in found.trials}
        threshold = math.inf if found.threshold is None else found.threshold
        for (_, rest), tried in self.made.items():
            trial = tried.trial(rest, accepted=tried.value > threshold)
            if (trial.first, trial.last, trial.rule, trial.committed) not in chosen:
                yield trial

    @cached_property
    def _influences(self) -> list[float]:
        return block_influence(self._view, self._captured)

    def _value(self, runs: Runs, base: Runs, bound: float | None) -> tuple[float, int | None]:
        """The mean over the evaluated samples, and their number if not all were evaluated."""
        seen: list[float] = []
        parts = self._similarity.parts
        for part in range(parts):
            if part == len(self._journal.cached(runs)):
                if part == 0:
                    self._count()
                # With streamed layers, early stopping would read the layers again for every batch.
                asked = range(part, parts) if self._streamed else [part]
                for values in self._measure(runs, base, asked):
                    self._journal.add(runs, values)
            seen += self._journal.cached(runs)[part]
            if part + 1 < parts and self._similarity.is_below(seen, bound):
                return sum(seen) / len(seen), len(seen)
        return sum(seen) / len(seen), None

    @inference_mode
    def _measure(self, runs: Runs, base: Runs, parts: Sequence[int]) -> Iterator[list[float]]:
        """The criterion's values for some parts of the samples."""
        if base != self._base:
            self._set_base(base)
        similarity = self._similarity
        numbers = range(len(self._captured)) if similarity.pooled else parts
        states = self._final_hidden(runs, base, numbers)
        if similarity.pooled:
            states = [torch.cat(states)]
        for part, hidden in zip(parts, states, strict=True):
            yield similarity.values(part, hidden)

    def _final_hidden(self, runs: Runs, base: Runs, numbers: Sequence[int]) -> list[Tensor]:
        """Hidden states after the final norm for some batches, with these runs merged."""
        # Below the lowest run in which the two models differ, their hidden states are equal.
        changed = {*runs} ^ {*base}
        start = min((run.first for run in changed), default=len(self._view.layers) - 1)
        states = run_batches(
            self._layers(runs, start),
            [self._captured[number] for number in numbers],
            [self._input(number, start) for number in numbers],
        )
        return [self._view.norm(hidden) for hidden in states]

    def _layers(self, runs: Runs, start: int) -> Iterator[tuple[int, nn.Module]]:
        """The layers from ``start`` on, with runs merged, and each one's lowest original index."""
        self._merged = {run: self._merged.get(run) or self._made(run) for run in runs}
        starts = {run.first: run for run in runs}
        index = start
        while index < len(self._view.layers):
            run = starts.get(index)
            yield index, self._merged[run] if run else self._view.layers[index]
            index = run.last + 1 if run else index + 1

    def _made(self, run: Run) -> nn.Module:
        """What surgery would make of the run; a window of one layer stays as it is."""
        if run.rule == DROP:
            from slm_plugin.models.torch_subclasses import Identity

            return Identity()
        layers = list(self._view.layers)[run.first : run.last + 1]
        return made_layer(run.operation, layers, self._dimensions) if run.removed else layers[0]

    def _set_base(self, base: Runs) -> None:
        """Compute the layer inputs of the model with these runs merged, for later trials."""
        self._base, self._inputs = base, []
        if not base:
            return
        lowest = min(run.first for run in base)
        states = [self._input(number, lowest) for number in range(len(self._captured))]
        inputs: list[tuple[dict[int, int], Spool]] = [({}, Spool()) for _ in self._captured]
        for index, layer in self._layers(base, lowest):
            for (places, spool), hidden in zip(inputs, states, strict=True):
                places[index] = len(spool)
                spool.append(hidden)
            states = run_batches([(index, layer)], self._captured, states)
        self._inputs = inputs

    def _input(self, number: int, index: int) -> Tensor:
        """Input of a layer for one batch, in the base model."""
        if number < len(self._inputs):
            places, inputs = self._inputs[number]
            if index in places:
                return inputs[places[index]]
        return self._captured[number].inputs[index]
