"""Fold a linear map of what a layer's MLP adds into its ``down_proj``.

Source: ReplaceMe (arXiv 2505.02819), its least-squares variant, with the ridge toward the identity.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slm_plugin.lazy import F
from slm_plugin.restoration.layer_walk import FittedLayer
from slm_plugin.restoration.least_squares import Regression
from slm_plugin.restoration.rewriting import Write

if TYPE_CHECKING:
    from torch import Tensor


def fold_layer(fitted: FittedLayer, write: Write) -> list[str]:
    """Fold the best map toward a layer's target, and return a note about it.

    With M what the MLP adds, X the residual stream after the layer and X* its target, the map is
    T = I + (M'M + aI)^-1 M'(X* - X), and the weights of ``down_proj`` become T'W, its bias T'b.

    Args:
        fitted: The layer.
        write: Writes values into a parameter.

    Raises:
        CalibrationError: There are fewer than 2 samples.
        NumericalError: NaN or infinity.
    """
    down = fitted.projections["down_proj"]
    fit = folding(fitted).solve()
    if fit.change is not None:
        for parameter in (down.weight, down.bias):
            if parameter is not None:
                write(parameter, _mapped(parameter, fit.change))
    return [f"{fitted.name}: {fit.describe()}"]


def folding(fitted: FittedLayer) -> Regression:
    """Regression of what a layer lacks on what its MLP adds."""
    down = fitted.projections["down_proj"]
    regression = Regression(fitted.name)
    for batch in fitted.batches(down):
        output = F.linear(batch.features, down.weight, down.bias) * fitted.multiplier
        regression.add(batch.start, output, batch.residual, batch.target)
    return regression


def _mapped(parameter: Tensor, change: Tensor) -> Tensor:
    """T' times a weight or a bias, where T is the identity plus the change."""
    values = parameter.to(change)
    return values + change.T @ values
