"""The record of one comparison: a cell for every method, target and recovery."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from slm_plugin.calibration.samples import CalibrationRecord
from slm_plugin.evaluation.base import Measurement
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.fingerprint import Fingerprint
from slm_plugin.plans import PruningPlan
from slm_plugin.record import Record
from slm_plugin.target import Target


class Cost(Record):
    """Time and memory of one step.

    Attributes:
        seconds: Wall-clock time.
        memory: Peak memory in bytes of the process, or on CUDA of PyTorch, above the memory that
            was allocated before; None where it cannot be measured.
        known_trials: Trials that the search may have read from the journal of an earlier one. If
            there are any, the time is a lower bound.
    """

    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    memory: Annotated[int, Field(ge=0)] | None = None
    known_trials: Annotated[int, Field(ge=0)] = 0


class Planned(Record):
    """A plan and the cost of making it."""

    plan: PruningPlan
    cost: Cost


class Cell(Record):
    """One method at one target with one recovery, or the dense model.

    Attributes:
        label: Name of the method in tables.
        method: Name of the strategy; None for the dense model.
        recovery: Name of the recovery; None where the model was left as pruned.
        recovered: Name of the recovery in tables; empty where there was none.
        after: Dimensions of the model that was measured; None where there is none.
        planning: Cost of planning.
        recovering: Cost of the recovery.
        measured: Figures by the name of their evaluator.
        error: Why figures are missing, in one line.
    """

    label: str
    method: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    recovery: str | None = None
    recovery_options: dict[str, Any] = Field(default_factory=dict)
    recovered: str = ""
    target: Target | None = None
    after: Dimensions | None = None
    planning: Cost | None = None
    recovering: Cost | None = None
    measured: dict[str, tuple[Measurement, ...]] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    error: str = ""

    @property
    def seconds(self) -> float | None:
        """Seconds of planning and recovery; None where neither was run."""
        spent = [one.seconds for one in (self.planning, self.recovering) if one is not None]
        return sum(spent) if spent else None

    @property
    def memory(self) -> int | None:
        """The larger peak of planning and recovery, in bytes; None where it was not measured."""
        costs = [one for one in (self.planning, self.recovering) if one is not None]
        peaks = [one.memory for one in costs if one.memory is not None]
        return max(peaks) if peaks and len(peaks) == len(costs) else None


class ComparisonReport(Record):
    """One comparison; written as ``comparison.json``. The first cell is the dense model."""

    format: Literal[1] = 1
    title: str
    created: str
    comparison: dict[str, Any]
    versions: dict[str, str]
    machine: str
    seed: int
    model: str
    calibration: CalibrationRecord | None
    fingerprint: Fingerprint
    cells: tuple[Cell, ...]
    seconds: float

    @property
    def dense(self) -> Dimensions:
        """Dimensions of the dense model."""
        after = self.cells[0].after
        assert after is not None
        return after
