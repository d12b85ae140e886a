"""Trials of a search that repairs: a candidate on top of the repaired runs before it.

The values of a trial depend on the order of the runs, so they are stored under the runs in that
order.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from slm_plugin.cache import Store
from slm_plugin.lazy import nn
from slm_plugin.plans import Trial
from slm_plugin.progress import counting
from slm_plugin.pruners.depth.measures.criteria import CriterionName
from slm_plugin.pruners.depth.search.journal import Journal, is_part, runs_of
from slm_plugin.pruners.depth.search.judged_samples import Part
from slm_plugin.pruners.depth.search.race import race
from slm_plugin.pruners.depth.search.repaired_stack import Candidate, RepairedStack
from slm_plugin.pruners.depth.search.repaired_values import RepairedValues
from slm_plugin.pruners.depth.search.runs import Measured, Runs
from slm_plugin.pruners.trial_store import repair_target, tell_read, trial_store

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session


# Values of the samples that no repair is fitted to.
FORM = "ordered runs, unfitted samples"


class Judged(NamedTuple):
    """A candidate with its value.

    Attributes:
        candidate: The candidate.
        value: The mean of the criterion over the evaluated samples; greater is better.
        samples: Number of evaluated samples after early stopping; None if all were.
        base: The runs before it, in order.
    """

    candidate: Candidate
    value: float
    samples: int | None
    base: Runs

    def trial(self, *, accepted: bool) -> Trial:
        """The trial as a record in a plan."""
        measured = Measured(self.candidate.run, self.value, self.samples)
        return measured.trial(self.base, accepted=accepted)


@contextmanager
def repaired_trials(
    session: Session, repair: str, criterion: CriterionName | None, costs: Sequence[float] = ()
) -> Iterator[RepairedTrials]:
    """Trials with a progress counter, stored in the session's journal.

    Args:
        session: Holds the model and its calibration set.
        repair: Name of one of `repaired_stack.REPAIRS`, or none.
        criterion: Judges the candidates; None judges them by the state behind the gap.
        costs: What each layer of the model costs; empty where all cost the same.

    Raises:
        OutputError: The journal cannot be written.
    """
    about = f"after {repair}{repair_target(session)}"
    journal = Journal(trial_store(session, f"{criterion} {about}", FORM, is_part))
    lacks = trial_store(session, f"lack {about}", FORM, _is_lack)
    tell_read(session, journal.read_from_disk, journal.store)
    with counting("repaired: trials") as count:
        yield RepairedTrials(session, repair, criterion, costs, journal, lacks, count)


class RepairedTrials:
    """Screens and judges candidates on the runs that were committed before.

    Attributes:
        stack: The remaining layers.
        made: Every judged candidate, in order.

    Args:
        session: Holds the model and its calibration set.
        repair: Name of one of `repaired_stack.REPAIRS`, or none.
        criterion: Judges the candidates; None judges them by the state behind the gap.
        costs: What each layer of the model costs, by which what the model loses without it is
            divided; empty where all cost the same.
        journal: Where the values of the criterion are stored.
        lacks: Where the errors of states are stored.
        count: Called for every candidate that is run.
    """

    def __init__(
        self,
        session: Session,
        repair: str,
        criterion: CriterionName | None,
        costs: Sequence[float] = (),
        journal: Journal | None = None,
        lacks: Store | None = None,
        count: Callable[[], None] = lambda: None,
    ) -> None:
        self.stack = RepairedStack(session, repair)
        self.made: list[Judged] = []
        self._values: RepairedValues | None = None
        if criterion is not None:
            self._values = RepairedValues(
                session, repair, criterion, journal or Journal(Store()), count
            )
        self._costs = costs
        self._stored = lacks or Store()
        self._count = count
        self._base: Runs = ()
        # By candidate: those of layers below the last change stay true.
        self._lacks: dict[Candidate, float] = {}
        self._repaired: dict[Candidate, nn.Module | None] = {}

    def lack(self, candidate: Candidate) -> float:
        """See `RepairedStack.lack`."""
        if candidate not in self._lacks:
            key = (*self._base, candidate.run)
            stored = self._stored.find(key)
            if stored is None:
                self._count()
                stored = self.stack.lack(candidate)
                self._stored.store(key, stored)
            self._lacks[candidate] = float(stored)
        return self._lacks[candidate]

    def estimate(self, candidate: Candidate) -> float:
        """What decides which candidates are judged; greater is better.

        It is minus what the state behind the candidate lacks. Where layers differ in cost, it is
        minus what it lacks more than now, for the cost.

        Raises:
            CalibrationError: There are fewer than 2 samples.
            NumericalError: Activations are NaN or infinite.
        """
        lack = self.lack(candidate)
        if not self._costs:
            return -lack
        return for_cost(self.stack.lack_now(candidate) - lack, self._cost(candidate))

    def best(self, candidates: Sequence[Candidate], *, whole: bool) -> Judged:
        """The candidate with the greatest mean of the criterion; of equal ones the lowest.

        Without a criterion it is the one of the greatest `estimate`. Where layers differ in cost,
        the difference to the mean without the candidate counts, for the cost (`for_cost`), and no
        candidate stops early.

        Args:
            candidates: At least one.
            whole: Judge all on all samples that count; see `race`.

        Raises:
            NumericalError: A value is NaN.
        """
        values = self._values
        if values is None:
            judged = [Judged(one, -self.lack(one), None, self._base) for one in candidates]
            ranks = [self.estimate(one) for one in candidates]
        else:
            seen = race(
                len(candidates),
                values.parts,
                lambda number, part: self._part(values, candidates[number], part),
                whole=whole or bool(self._costs),
            )
            most = max(map(len, seen))
            judged = [
                Judged(one, fmean(v), len(v) if len(v) < most else None, self._base)
                for one, v in zip(candidates, seen, strict=True)
            ]
            ranks = self._ranks(values, judged)
        self.made += judged
        ranked = zip(judged, ranks, strict=True)
        return max(ranked, key=lambda one: (one[0].samples is None, one[1], *_lowest(one[0])))[0]

    def commit(self, chosen: Judged) -> None:
        """Carry a candidate out; later ones come on top of it."""
        candidate = chosen.candidate
        self.stack.commit(candidate, self._layer(candidate))
        self._base = (*self._base, candidate.run)
        self._repaired = {}
        # What lies two layers below sees neither another layer nor another target.
        self._lacks = {c: v for c, v in self._lacks.items() if c.at + c.replaced <= candidate.at}

    def _ranks(self, values: RepairedValues, judged: Sequence[Judged]) -> list[float]:
        """What ranks candidates; greater is better."""
        if not self._costs:
            return [one.value for one in judged]
        parts = (values.unstored(part, self.stack.outputs) for part in range(values.parts))
        now = fmean(chain.from_iterable(parts))
        return [for_cost(one.value - now, self._cost(one.candidate)) for one in judged]

    def _cost(self, candidate: Candidate) -> float:
        """The cost of the layer that goes, of two that merge the upper one."""
        return self._costs[candidate.run.last]

    def _part(self, values: RepairedValues, candidate: Candidate, part: int) -> list[float]:
        """The criterion's values of the samples of a part."""

        def final(asked: Part) -> Tensor:
            return self.stack.final(candidate, self._layer(candidate), asked)

        return values((*self._base, candidate.run), part, final)

    def _layer(self, candidate: Candidate) -> nn.Module | None:
        if candidate not in self._repaired:
            self._repaired[candidate] = self.stack.repaired(candidate)
        return self._repaired[candidate]


def for_cost(gain: float, cost: float) -> float:
    """A loss, which is a gain below 0, divided by a cost; a gain multiplied by it.

    So of two candidates that lose as much the one that saves more is better, and of two that gain
    as much too.
    """
    return gain / cost if gain < 0 else gain * cost


def _lowest(judged: Judged) -> tuple[int, int]:
    run = judged.candidate.run
    return -run.first, -run.last


def _is_lack(key: Any, value: Any) -> bool:
    """Whether a line holds ordered runs and an error."""
    hash(runs_of(key))
    return math.isfinite(float(value)) and float(value) >= 0
