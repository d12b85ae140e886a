"""The evaluator interface and the one form that every measured figure has."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

if TYPE_CHECKING:
    from slm_plugin.session import Session


class Measurement(BaseModel):
    """One figure, with the protocol that it was taken by.

    Two measurements compare only when both name and protocol are equal.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    value: float
    protocol: str
    better: Literal["lower", "higher"]
    unit: str = ""
    stderr: float | None = None


class EvaluatorOptions(BaseModel):
    """Options that every evaluator has; subclasses add their own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    every_stage: bool = Field(
        default=False, description="measure after every stage too, not only before and after all"
    )


class Evaluator(ABC):
    """Measures the session's model and leaves it as it is.

    ``streams`` says that it works on a model whose layers are read from disk at every forward.

    Args:
        options: An instance of the class's ``Options``.
    """

    name: ClassVar[str]
    extra: ClassVar[str | None] = None
    streams: ClassVar[bool] = False
    Options: ClassVar[type[EvaluatorOptions]] = EvaluatorOptions

    def __init__(self, options: EvaluatorOptions) -> None:
        self.options = options

    def check(self) -> None:  # noqa: B027 - most evaluators have nothing to refuse
        """Refuse what cannot work (a missing file, an unknown task) when the recipe is read.

        Nothing that the recipe only names is run here: `validate` ends behind it.
        """

    def load(self) -> None:  # noqa: B027 - most evaluators have nothing to load
        """Load what measuring needs beside the model, once, before the model is loaded.

        Called where the recipe is carried out: code that it names may run.

        Raises:
            UserError: It cannot be loaded.
        """

    def fit(self, session: Session) -> None:  # noqa: B027 - most models have room for most
        """Refuse a model that the measurement does not fit, before any stage runs.

        Raises:
            UserError: The model has too few positions, say.
        """

    @abstractmethod
    def measure(self, session: Session) -> list[Measurement]:
        """Measure the model in its present state."""
