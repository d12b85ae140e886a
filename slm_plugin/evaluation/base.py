"""The evaluator interface and the record of a measurement."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, Field

from slm_plugin.component import Component, Options
from slm_plugin.record import Record

if TYPE_CHECKING:
    from slm_plugin.session import Session


class Measurement(Record):
    """One measured figure with its protocol.

    Two measurements are comparable only if name and protocol are equal.
    """

    name: str
    value: float
    protocol: str
    better: Literal["lower", "higher"]
    unit: str = ""
    stderr: float | None = None


class EvaluatorOptions(Options):
    """Options that every evaluator has; subclasses add their own."""

    every_stage: bool = Field(
        default=False,
        description="measure after every stage too, not only at start and end",
    )


class Evaluator(Component):
    """Measures the session's model without changing it."""

    Options: ClassVar[type[BaseModel]] = EvaluatorOptions
    options: EvaluatorOptions

    def check(self) -> None:
        """Check the options (a missing file, an unknown task) when the recipe is read.

        Code that the recipe names must not run here: `validate` calls only this.
        """

    def load(self) -> None:
        """Load what the measurement needs, once, before the model is loaded.

        Called when the recipe is run: code that the recipe names may run here.

        Raises:
            UserError: It cannot be loaded.
        """

    def check_model(self, session: Session) -> None:
        """Check, before any stage runs, that the model can be measured.

        Raises:
            UserError: It cannot, for example because it has too few positions.
        """

    @abstractmethod
    def measure(self, session: Session) -> list[Measurement]:
        """Measure the model in its present state."""
