"""The recovery interface: what repairs a model after pruning."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import BaseModel

from slm_plugin.record import Record

if TYPE_CHECKING:
    from slm_plugin.session import Session


class RecoveryRecord(Record):
    """The record of one recovery stage: options, losses and notes."""

    recovery: str
    options: dict[str, object]
    losses: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


class RecoveryOptions(Record):
    """Base of every recovery's options."""


class Recovery(ABC):
    """Changes the values of weights, and nothing else of the model.

    `Session.recover` runs it in evaluation mode and from the session's seed, and checks the result:
    shapes, number format, device, modules, hooks and configuration must be unchanged, and no weight
    may be NaN. A recovery that raises must leave the model unchanged. The session restores
    gradients, their flags and the training mode, and clears its own cached values.

    ``reference`` says that the recovery needs the hidden states of the dense model, which it reads
    from `Session.reference`. ``operators`` says that it inserts operators between layers
    (`slm_plugin.models.operators`). No stock model class holds operators, so no later stage of the
    recipe may prune or use the reference, and only exporters that support operators can follow.
    ``fewest_samples`` is the smallest calibration set that it accepts. A smaller one is rejected
    before the first stage.

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
