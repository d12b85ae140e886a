"""The record of one run: everything the report, the page and the model card show."""

from __future__ import annotations

from typing import Any, Literal

from slm_plugin.calibration.samples import CalibrationRecord
from slm_plugin.evaluation.base import Measurement
from slm_plugin.export.base import ExportRecord
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.fingerprint import Fingerprint
from slm_plugin.record import Record
from slm_plugin.recovery.base import RecoveryRecord


class StageRecord(Record):
    """One stage: a plan that was applied, or a recovery.

    ``plan`` is the plan's file relative to the output folder.
    """

    number: int
    kind: Literal["depth", "width", "hybrid", "recovery"]
    name: str
    summary: str
    seconds: float
    after: Dimensions
    plan: str | None = None
    recovery: RecoveryRecord | None = None
    warnings: tuple[str, ...] = ()


class StateRecord(Record):
    """Measurements of one state of the model.

    ``stage`` is 0 before the first stage and a stage's number after it.
    """

    stage: int
    label: str
    measurements: tuple[Measurement, ...]


class RunReport(Record):
    """One run from recipe to exports; written as ``report.json``."""

    format: Literal[1] = 1
    title: str
    created: str
    recipe: dict[str, Any]
    versions: dict[str, str]
    machine: str
    seed: int
    model: str
    license: str | None = None
    calibration: CalibrationRecord | None
    input: Fingerprint
    output: Fingerprint
    before: Dimensions
    after: Dimensions
    stages: tuple[StageRecord, ...]
    states: tuple[StateRecord, ...]
    exports: tuple[ExportRecord, ...]
    seconds: float
