"""Repair of boundaries by a linear map that is folded into the MLP before them.

Source: ReplaceMe (arXiv 2505.02819), its least-squares variant, with the ridge toward the identity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from slm_plugin.lazy import F, no_grad
from slm_plugin.models.view import projections
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.recovery.closed_form.boundaries import boundaries
from slm_plugin.recovery.closed_form.layer_walk import Ascent, repair_upwards
from slm_plugin.recovery.closed_form.least_squares import Regression
from slm_plugin.recovery.closed_form.rewriting import Write
from slm_plugin.registry import register_recovery

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session


@register_recovery("fold_linear")
class FoldLinear(Recovery):
    """Fold the linear map that comes nearest to the missing layers into the MLP before them.

    With M what the layer's MLP adds to the residual stream, X the stream behind it and X* what the
    dense model had there, the map is T = I + (M'M + aI)^-1 M'(X* - X), and the weights of
    ``down_proj`` become T'W, its bias T'b. The ridge pulls T toward the identity, which is plain
    removal.
    """

    reference: ClassVar[bool] = True
    fewest_samples: ClassVar[int] = 2

    @no_grad
    def recover(self, session: Session) -> RecoveryRecord:
        """Repair every boundary from the bottom up, each on what the repaired model makes of it.

        Raises:
            CalibrationError: No reference was kept, or it has fewer than 2 samples.
            UnsupportedModelError: The residual stream has another width than the reference's.
            NumericalError: NaN or infinity; the model keeps its former weights.
        """
        return repair_upwards(self, session, boundaries(session), _fold)


def _fold(ascent: Ascent, write: Write) -> list[str]:
    down = projections(ascent.layer)["down_proj"]
    regression = Regression(f"layer {ascent.position}")
    for sight in ascent.look(down):
        written = F.linear(sight.inner, down.weight, down.bias)
        regression.add(sight.start, written, sight.lack, sight.target)
    fit = regression.solve()
    if fit.change is not None:
        for parameter in (down.weight, down.bias):
            if parameter is not None:
                write(parameter, _mapped(parameter, fit.change))
    return [f"layer {ascent.position}: {fit.describe()}"]


def _mapped(parameter: Tensor, change: Tensor) -> Tensor:
    """T' times a weight or a bias, where T is the identity plus the change."""
    values = parameter.to(change)
    return values + change.T @ values
