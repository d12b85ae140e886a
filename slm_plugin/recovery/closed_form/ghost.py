"""Repair of gaps by a linear map of the residual stream, an operator of its own.

Source: Ghosted Layers (arXiv 2605.15491).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar

from slm_plugin.lazy import no_grad, torch
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.recovery.closed_form.layer_walk import Sight
from slm_plugin.recovery.closed_form.least_squares import Regression
from slm_plugin.recovery.closed_form.operators import put_operators
from slm_plugin.registry import register_recovery

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session


@register_recovery("ghost")
class Ghost(Recovery):
    """Multiply the stream behind every gap by the matrix that comes nearest to what is missing.

    With X the stream behind the gap and X* what the dense model had there, the operator is
    W = I + (X'X + aI)^-1 X'(X* - X): least squares with the ridge toward the identity, which is
    plain removal. It adds hidden times hidden parameters a gap, and no stock class holds it.
    """

    reference: ClassVar[bool] = True
    fewest_samples: ClassVar[int] = 2
    operators: ClassVar[bool] = True

    @no_grad
    def recover(self, session: Session) -> RecoveryRecord:
        """Put the operators there.

        Raises:
            CalibrationError: No reference was kept, or it has fewer than 2 samples.
            UnsupportedModelError: The residual stream has another width than the reference's, or
                has operators already.
            NumericalError: NaN or infinity; the model stays as it was.
        """
        return put_operators(self, session, _fitted)


def _fitted(see: Callable[[], Iterable[Sight]], where: str) -> tuple[Tensor | None, str]:
    regression = Regression(where)
    for sight in see():
        regression.add(sight.start, sight.inner, sight.lack, sight.target)
    fit = regression.solve()
    if fit.change is None:
        return None, fit.describe()
    return torch.eye(len(fit.change)).to(fit.change) + fit.change, fit.describe()
