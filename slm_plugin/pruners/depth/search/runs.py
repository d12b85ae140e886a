"""Runs of layers to merge or drop, and results of trials: the types of all searches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from slm_plugin.plans import DepthOperation, DropLayers, DropSublayers, MergeLayers, Trial

# In place of a merge rule: the run is dropped.
DROP = "drop"
# Likewise: the first layer's attention and the last layer's MLP remain, as one layer.
JOIN = "join"


class Run(NamedTuple):
    """Layers first..last of the original model, merged into one; see `plan.MergeLayers`.

    The rules `DROP` and `JOIN` are no merge rules.
    """

    first: int
    last: int
    rule: str
    weights_only: bool = False

    @property
    def removed(self) -> int:
        """Number of layers that the run removes."""
        return self.last - self.first + (self.rule == DROP)

    @property
    def operation(self) -> DepthOperation:
        """What a plan says of the run.

        Raises:
            ValueError: It is a merge of one layer, which changes nothing.
        """
        if self.rule == DROP:
            return DropLayers(indices=tuple(range(self.first, self.last + 1)))
        if self.rule == JOIN:
            return DropSublayers(
                attention=tuple(range(self.first + 1, self.last + 1)),
                mlp=tuple(range(self.first, self.last)),
            )
        return MergeLayers(
            first=self.first, last=self.last, rule=self.rule, weights_only=self.weights_only
        )


Runs = tuple[Run, ...]


class Measured(NamedTuple):
    """The result of a trial.

    Attributes:
        run: The run that was tried, with its best rule.
        value: The criterion's mean over the evaluated samples; greater is more similar.
        samples: Number of evaluated samples after early stopping; None if all were evaluated.
    """

    run: Run
    value: float
    samples: int | None = None

    def trial(self, rest: Runs, *, accepted: bool) -> Trial:
        """The trial as a record in a plan."""
        dropped = {run.rule == DROP for run in (self.run, *rest)}
        return Trial(
            first=self.run.first,
            last=self.run.last,
            rule=self.run.rule,
            committed=tuple((run.first, run.last) for run in rest),
            similarity=self.value,
            samples=self.samples,
            layers_removed=removed((self.run, *rest)) if len(dropped) > 1 else None,
            accepted=accepted,
        )


class Measure(Protocol):
    """Compares a model with some runs merged to the original one."""

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
        """Try one more run in addition to others.

        Args:
            first: Lowest layer of the run.
            last: Highest layer of the run.
            rest: The other runs of the model.
            base: Runs that many consecutive trials share; the inputs of layers below the first
                difference are then computed once.
            bound: The trial may stop once its value cannot exceed this.
            rule: The run's own merge rule, if it differs from that of all runs.
        """


def alike(kinds: Sequence[object], first: int, last: int) -> bool:
    """Whether the layers from first to last are of one kind; all are where no kinds are given."""
    return len(set(kinds[first : last + 1])) <= 1


@dataclass(frozen=True, slots=True)
class Rules:
    """The layers that a search may merge.

    Attributes:
        layers: Decoder layers of the model.
        protect_first: Number of lowest layers that are protected.
        protect_last: Number of highest layers that are protected.
        kinds: What makes each layer differ from others, as its attention type; layers of different
            kinds are never merged. Empty where all are alike.
    """

    layers: int
    protect_first: int
    protect_last: int
    kinds: tuple[object, ...] = ()

    @property
    def top(self) -> int:
        """Highest layer that may merge."""
        return self.layers - 1 - self.protect_last

    @property
    def most(self) -> int:
        """Largest number of layers that can be removed: one for every two neighbours alike."""
        return sum(self.alike(low, low + 1) for low in range(self.protect_first, self.top))

    def alike(self, first: int, last: int) -> bool:
        """Whether the layers from first to last are of one kind."""
        return alike(self.kinds, first, last)


@dataclass(frozen=True, slots=True)
class Found:
    """The result of a search.

    Attributes:
        runs: The runs to merge, in the order in which they were found.
        trials: The trials that led to the result, in order.
        threshold: The threshold of the search, if it has one.
        notes: Explanations of the result.
    """

    runs: Runs
    trials: tuple[Trial, ...]
    threshold: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def removed(self) -> int:
        """Number of layers that the runs remove."""
        return removed(self.runs)


def removed(runs: Runs) -> int:
    """Number of layers that these runs remove."""
    return sum(run.removed for run in runs)
