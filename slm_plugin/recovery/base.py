"""The recovery interface: what repairs a model after pruning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel, ConfigDict

if TYPE_CHECKING:
    from slm_plugin.session import Session


class RecoveryRecord(BaseModel):
    """What a recovery stage did, as figures over its steps."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    recovery: str
    options: dict[str, object]
    losses: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


class RecoveryOptions(BaseModel):
    """Base of every recovery's options."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Recovery(ABC):
    """Changes the values of weights, and nothing else of the model.

    `Session.recover` runs it, in evaluation mode and from the session's seed, and holds it to that:
    shapes, number format, device, modules, hooks and configuration are as before when it ends, and
    no weight is NaN. A recovery that raises leaves the model as it was. Gradients, their flags and
    training mode are put back for it, and the session forgets by itself what it had derived.

    ``reference`` says that the recovery leads the model back to what its layers computed before
    the first stage: it finds that in `Session.reference`. ``operators`` says that it puts operators
    between layers (`slm_plugin.models.operators`), which no stock class holds: a recipe then may
    neither prune nor repair by the reference behind it, and exports only what can hold them.
    ``fewest_samples`` says how many samples the calibration set must have: less is refused before
    the first stage, and not behind a search of hours.

    Args:
        options: An instance of the class's ``Options``.
    """

    name: ClassVar[str]
    extra: ClassVar[str | None] = None
    streams: ClassVar[bool] = False
    reference: ClassVar[bool] = False
    operators: ClassVar[bool] = False
    fewest_samples: ClassVar[int] = 1
    Options: ClassVar[type[BaseModel]] = RecoveryOptions

    def __init__(self, options: BaseModel) -> None:
        self.options = options

    @property
    def needs_calibration(self) -> bool:
        """Whether the recovery, with these options, trains or measures on calibration data."""
        return True

    @abstractmethod
    def recover(self, session: Session) -> RecoveryRecord:
        """Repair the session's model in place; called by `Session.recover`."""
