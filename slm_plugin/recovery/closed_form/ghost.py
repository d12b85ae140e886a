"""Repair of gaps by a linear map of the residual stream, inserted as an operator.

Source: Ghosted Layers (arXiv 2605.15491).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar

from slm_plugin.lazy import no_grad, torch
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.recovery.closed_form.operators import put_operators
from slm_plugin.registry import register_recovery
from slm_plugin.restoration.layer_walk import LayerBatch
from slm_plugin.restoration.least_squares import Regression

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session


@register_recovery("ghost")
class Ghost(Recovery):
    """Multiply the stream after every gap by the least-squares map to the dense model's stream.

    With X the stream after the gap and X* the stream of the dense model there, the operator is
    W = I + (X'X + aI)^-1 X'(X* - X): least squares with a ridge toward the identity, which is
    removal without repair. It adds hidden x hidden parameters per gap. No stock model class holds
    operators.
    """

    reference: ClassVar[bool] = True
    fewest_samples: ClassVar[int] = 2
    operators: ClassVar[bool] = True

    @no_grad
    def recover(self, session: Session) -> RecoveryRecord:
        """Insert the operators.

        Raises:
            CalibrationError: The session has no reference, or it has fewer than 2 samples.
            UnsupportedModelError: The residual stream and the reference differ in width, or the
                model has operators already.
            NumericalError: NaN or infinity; the model stays unchanged.
        """
        return put_operators(self, session, _fitted)


def _fitted(batches: Callable[[], Iterable[LayerBatch]], where: str) -> tuple[Tensor | None, str]:
    regression = Regression(where)
    for batch in batches():
        regression.add(batch.start, batch.features, batch.residual, batch.target)
    fit = regression.solve()
    if fit.change is None:
        return None, fit.describe()
    return torch.eye(len(fit.change)).to(fit.change) + fit.change, fit.describe()
