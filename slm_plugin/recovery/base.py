"""The recovery interface: what repairs a model after pruning."""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, ClassVar

from slm_plugin.component import Component
from slm_plugin.record import Record

if TYPE_CHECKING:
    from slm_plugin.session import Session


class RecoveryRecord(Record):
    """The record of one recovery stage: options, losses and notes."""

    recovery: str
    options: dict[str, object]
    losses: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()


class Recovery(Component):
    """Changes the values of weights, and nothing else of the model.

    `Session.recover` runs it in evaluation mode and from the session's seed, and checks the result:
    shapes, number format, device, modules, hooks and configuration must be unchanged, and no weight
    may be NaN. A recovery that raises must leave the model unchanged. The session restores
    gradients, their flags and the training mode, and clears its own cached values.

    Attributes:
        reference: It needs the hidden states of the dense model, from `Session.reference`.
        operators: It inserts operators between layers (`slm_plugin.models.operators`). No stock
            model class holds operators, so no later stage of the recipe may prune or use the
            reference, and only exporters that support operators can follow.
        fewest_samples: The smallest calibration set that it accepts. A smaller one is rejected
            before the first stage.
    """

    reference: ClassVar[bool] = False
    operators: ClassVar[bool] = False
    fewest_samples: ClassVar[int] = 1

    @property
    def needs_calibration(self) -> bool:
        """Whether the recovery, with these options, trains or measures on calibration data."""
        return True

    @property
    def former_layers(self) -> bool:
        """Whether it needs `Session.former_layers`, the layers before the last width stage."""
        return False

    @abstractmethod
    def recover(self, session: Session) -> RecoveryRecord:
        """Repair the session's model in place; called by `Session.recover`."""
