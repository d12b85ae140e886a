"""Runs of layers that merge or go, and what a trial of one gave: the words of all searches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

from slm_plugin.plans import Trial

# In the place of a merge rule: nothing takes the place of the run.
DROP = "drop"
# Likewise: the first layer's attention and the last one's MLP are what is left of the run.
JOIN = "join"


class Run(NamedTuple):
    """Layers first..last of the original model, merged into one; see `plan.MergeLayers`.

    With the rule `DROP` they go altogether; see `JOIN` for the other one that is no merge rule.
    """

    first: int
    last: int
    rule: str
    weights_only: bool = False

    @property
    def removed(self) -> int:
        """Layers that the run takes away."""
        return self.last - self.first + (self.rule == DROP)


Runs = tuple[Run, ...]


class Measured(NamedTuple):
    """What a trial gave.

    Attributes:
        run: The run that was tried, with the rule that served it best.
        value: The criterion's mean over the samples seen; greater is more alike.
        samples: Samples seen, where fewer than all showed the trial to be hopeless; else None.
    """

    run: Run
    value: float
    samples: int | None = None

    def trial(self, rest: Runs, *, accepted: bool) -> Trial:
        """The trial as a line of a plan."""
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
    """Compares a model with some runs merged with the original one."""

    def __call__(
        self,
        first: int,
        last: int,
        rest: Runs,
        *,
        base: Runs = (),
        hopeless_at: float | None = None,
        rule: str | None = None,
    ) -> Measured:
        """Try one more run on top of others.

        Args:
            first: Lowest layer of the run.
            last: Highest layer of the run.
            rest: The other runs of the model that is tried.
            base: The runs of a model that many trials in a row start from: what layers below the
                first difference see is then computed once.
            hopeless_at: The trial may stop when its value is certain not to exceed this.
            rule: The run's own merge rule, where it is not that of all runs.
        """


@dataclass(frozen=True, slots=True)
class Rules:
    """What a search may do.

    Attributes:
        layers: Decoder layers of the model.
        protect_first: Lowest layers that never take part.
        protect_last: Highest layers that never take part.
    """

    layers: int
    protect_first: int
    protect_last: int

    @property
    def top(self) -> int:
        """Highest layer that takes part."""
        return self.layers - 1 - self.protect_last

    @property
    def most(self) -> int:
        """Layers that can go at most: all but one of those that take part."""
        return max(0, self.top - self.protect_first)


@dataclass(frozen=True, slots=True)
class Found:
    """What a search decided.

    Attributes:
        runs: The runs to merge, in the order in which they were decided.
        trials: The trials of the decision, in order.
        threshold: The threshold that decided, if one did.
        notes: Why these runs, in sentences.
    """

    runs: Runs
    trials: tuple[Trial, ...]
    threshold: float | None = None
    notes: tuple[str, ...] = ()

    @property
    def removed(self) -> int:
        """Layers that the runs take away."""
        return removed(self.runs)


def removed(runs: Runs) -> int:
    """Layers that these runs take away."""
    return sum(run.removed for run in runs)
