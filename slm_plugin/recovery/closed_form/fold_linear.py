"""Repair of boundaries by a linear map that is folded into the preceding MLP.

Source: ReplaceMe (arXiv 2505.02819), its least-squares variant, with the ridge toward the identity.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from slm_plugin.lazy import no_grad
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.recovery.closed_form.layer_repair import repair_layers
from slm_plugin.registry import register_recovery
from slm_plugin.restoration.boundaries import boundaries
from slm_plugin.restoration.folding import fold_layer

if TYPE_CHECKING:
    from slm_plugin.models.families.family import Family
    from slm_plugin.session import Session


@register_recovery("fold_linear")
class FoldLinear(Recovery):
    """Fold the best linear approximation of the missing layers into the preceding MLP.

    With M what the layer's MLP adds, X the residual stream after the layer and X* the stream
    of the dense model there, the map is T = I + (M'M + aI)^-1 M'(X* - X), and the weights of
    ``down_proj`` become T'W, its bias T'b. The ridge pulls T toward the identity, which is
    removal without repair.
    """

    reference: ClassVar[bool] = True
    fewest_samples: ClassVar[int] = 2

    @classmethod
    def unsuited(cls, family: Family, config: Mapping[str, Any]) -> str:
        """A norm behind the MLP is no linear map."""
        if family.no_fit:
            return family.no_fit
        if family.norm_behind:
            return "a norm stands behind its MLP, so no linear map can be folded into it"
        return ""

    @no_grad
    def recover(self, session: Session) -> RecoveryRecord:
        """Repair every boundary from the bottom up, with the lower ones already repaired.

        Raises:
            CalibrationError: The session has no reference, or it has fewer than 2 samples.
            UnsupportedModelError: The residual stream and the reference differ in width.
            NumericalError: NaN or infinity; the model keeps its former weights.
        """
        return repair_layers(self, session, boundaries(session), fold_layer)
