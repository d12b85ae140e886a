"""The record of one comparison: a cell for every method, target and recovery."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from slm_plugin.calibration.samples import CalibrationRecord
from slm_plugin.evaluation.base import Measurement
from slm_plugin.models.fingerprint import Fingerprint
from slm_plugin.models.view import Dimensions
from slm_plugin.plans import PruningPlan
from slm_plugin.target import Target


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Effort(_Record):
    """What a piece of work took.

    Attributes:
        seconds: From its beginning to its end.
        memory: Bytes that the process, or on CUDA PyTorch, held at most during the work beyond
            what it held before; None where nothing tells.
        known_trials: Trials that the search may have read from an earlier one's journal instead of
            making them: with any, the time is a lower bound.
    """

    seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)]
    memory: Annotated[int, Field(ge=0)] | None = None
    known_trials: Annotated[int, Field(ge=0)] = 0


class Planned(_Record):
    """A plan, and what making it took."""

    plan: PruningPlan
    effort: Effort


class Cell(_Record):
    """One method at one target with one recovery, or the dense model.

    Attributes:
        label: What tables call the method.
        method: Name of the strategy; None for the dense model.
        recovery: Name of the recovery; None where the model was left as pruned.
        recovered: What the recovery is called in tables; empty where there was none.
        after: Dimensions of the model that was measured; None where there is none.
        planning: What the strategy took.
        recovering: What the recovery took.
        measured: Figures by the name of their evaluator.
        error: Why there are no figures, or not all, in one line.
    """

    label: str
    method: str | None = None
    options: dict[str, Any] = {}
    recovery: str | None = None
    recovery_options: dict[str, Any] = {}
    recovered: str = ""
    target: Target | None = None
    after: Dimensions | None = None
    planning: Effort | None = None
    recovering: Effort | None = None
    measured: dict[str, tuple[Measurement, ...]] = {}
    warnings: tuple[str, ...] = ()
    error: str = ""

    @property
    def seconds(self) -> float | None:
        """Seconds of planning and recovery; None where nothing was done."""
        spent = [one.seconds for one in (self.planning, self.recovering) if one is not None]
        return sum(spent) if spent else None

    @property
    def memory(self) -> int | None:
        """The larger peak of planning and recovery, in bytes; None where nothing tells."""
        efforts = [one for one in (self.planning, self.recovering) if one is not None]
        peaks = [one.memory for one in efforts if one.memory is not None]
        return max(peaks) if peaks and len(peaks) == len(efforts) else None


class ComparisonReport(_Record):
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
        """Dimensions of the model as it was loaded."""
        after = self.cells[0].after
        assert after is not None
        return after
