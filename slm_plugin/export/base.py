"""The exporter interface and the record of what was written and how it was proved."""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from slm_plugin.component import Component
from slm_plugin.record import Record

if TYPE_CHECKING:
    from slm_plugin.session import Session


class Check(Record):
    """One comparison of what was written with the model in memory."""

    name: str
    value: float
    tolerance: float
    unit: str = ""


class ExportRecord(Record):
    """What an exporter wrote; every check passed, or there would be no record.

    ``padding`` is the number of zeros in the files that are no parameters of the model: layers of
    different widths are padded for stock classes.
    """

    exporter: str
    folder: str
    size_bytes: int
    checks: tuple[Check, ...]
    padding: int = 0


class Exporter(Component):
    """Writes the session's model in one format and proves that the result computes the same.

    Attributes:
        operators: What it writes can hold operators between layers
            (`slm_plugin.models.operators`).
    """

    operators: ClassVar[bool] = False

    def check_model(self, session: Session) -> None:
        """Refuse a model that the format cannot hold, before any stage runs.

        Raises:
            UnsupportedModelError: The format would compute something else.
        """

    @abstractmethod
    def export(self, session: Session, output: Path) -> ExportRecord:
        """Write into ``output / self.name`` and verify.

        Raises:
            VerificationError: What was written does not compute what the model computes.
        """
