"""The exporter interface and the record of what was written and how it was proved."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel

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
    """What an exporter wrote; every check passed, or there would be no record."""

    exporter: str
    folder: str
    size_bytes: int
    checks: tuple[Check, ...]


class ExporterOptions(Record):
    """Base of every exporter's options."""


class Exporter(ABC):
    """Writes the session's model in one format and proves that the result computes the same.

    ``streams`` says that it works on a model whose weights are not in memory, ``operators`` that
    what it writes can hold operators between layers (`slm_plugin.models.operators`).

    Args:
        options: An instance of the class's ``Options``.
    """

    name: ClassVar[str]
    extra: ClassVar[str | None] = None
    streams: ClassVar[bool] = False
    operators: ClassVar[bool] = False
    Options: ClassVar[type[BaseModel]] = ExporterOptions

    def __init__(self, options: BaseModel) -> None:
        self.options = options

    def check_model(self, session: Session) -> None:  # noqa: B027 - most formats hold all models
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
