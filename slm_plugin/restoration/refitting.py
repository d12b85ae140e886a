"""Refit of the output projections of one layer by least squares.

Source: least-squares output matching as in SparseGPT (arXiv 2301.00774, section 3) and ReplaceMe
(arXiv 2505.02819), here with the pruned model's activations as features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slm_plugin.lazy import F, torch
from slm_plugin.restoration.layer_walk import FittedLayer
from slm_plugin.restoration.least_squares import Regression, share
from slm_plugin.restoration.rewriting import Write

if TYPE_CHECKING:
    from torch import Tensor, nn

# Parts of the fitted change that are tried behind a norm.
STEPS = (1.0, 0.5, 0.25, 0.125)
# Of the largest gain of a norm.
SMALLEST_GAIN = 1e-2


def refit_layer(fitted: FittedLayer, write: Write, *, o_proj: bool) -> list[str]:
    """Refit a layer toward its target, and return notes about it.

    With Z the input of a projection, X the stream after its layer and X* the target there, the D
    that minimises ||Z D' - (X* - X)||^2 + a||D||^2 is added to its weight W: the ridge pulls toward
    the present weight. A bias is a constant column of Z.

    Where a norm stands behind the projection, as in Gemma, its division is held fixed for the fit,
    and the longest of a few steps that lowers the measured held-out error is taken.

    Args:
        fitted: The layer.
        write: Writes values into a parameter.
        o_proj: Refit the attention's output before ``down_proj``.

    Raises:
        CalibrationError: There are fewer than 2 samples.
        NumericalError: NaN or infinity.
    """
    where = fitted.name
    if not o_proj:
        return [f"{where}: {_improve(fitted, _Writer.of(fitted, 'down_proj'), write)}"]
    out, down = (_Writer.of(fitted, name) for name in ("o_proj", "down_proj"))
    first = _regression(fitted, out).residual
    former = [parameter.clone() for parameter in out.linear.parameters()]
    said = _improve(fitted, out, write)
    # The fit assumes a fixed MLP output, but the MLP reads the new attention output.
    if _regression(fitted, down).residual > first:
        _restore(out.linear, former, write)
        said += ", undone: the error after the MLP grew"
    return [f"{where} o_proj: {said}", f"{where}: {_improve(fitted, down, write)}"]


@dataclass(frozen=True, slots=True)
class _Writer:
    """A projection whose output is added to the residual stream, and what stands between.

    Attributes:
        linear: The projection.
        multiplier: Factor of what is added.
        gain: What the norm behind the projection multiplies by, ``(hidden,)``; None without one.
        epsilon: What that norm adds to the mean square.
    """

    linear: nn.Linear
    multiplier: float
    gain: Tensor | None = None
    epsilon: float = 0.0

    @classmethod
    def of(cls, fitted: FittedLayer, name: str) -> _Writer:
        linear, norm = fitted.projections[name], fitted.norm_behind(name)
        if norm is None:
            return cls(linear, fitted.multiplier)
        gain = norm.get_parameter("weight").double() + fitted.family.gain_offset
        epsilon: Any = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", 0.0)
        return cls(linear, fitted.multiplier, gain, float(epsilon))

    def features(self, inputs: Tensor) -> Tensor:
        """Features in which what is added is linear, to first order where a norm is behind."""
        found = inputs
        if self.linear.bias is not None:
            found = torch.cat([found, torch.ones_like(found[..., :1])], dim=-1)
        if self.gain is None:
            return found * self.multiplier
        output = F.linear(inputs, self.linear.weight, self.linear.bias).float()
        # The norm divides by this; it depends on the weights, but is taken as fixed for the fit.
        return found * torch.rsqrt(output.square().mean(-1, keepdim=True) + self.epsilon)


def _improve(fitted: FittedLayer, writer: _Writer, write: Write) -> str:
    """Refit one projection; behind a norm, with the longest step that lowers the error."""
    first = _regression(fitted, writer)
    fit = first.solve()
    if fit.change is None or writer.gain is None:
        _add(writer.linear, fit.change, write)
        return fit.describe()
    # A channel that the norm hardly passes on would need, and get, a boundless change.
    gain = writer.gain.to(fit.change)
    used = gain.abs() > SMALLEST_GAIN * gain.abs().max()
    change = torch.where(used, fit.change / torch.where(used, gain, 1.0), 0.0)
    former = [parameter.clone() for parameter in writer.linear.parameters()]
    for step in STEPS:
        _add(writer.linear, step * change, write)
        reached = _regression(fitted, writer)
        if reached.residual < first.residual:
            after = share(reached.residual, reached.target)
            return (
                f"ridge {fit.ridge:g}, step {step:g}, held-out error {fit.before:.2%} to "
                f"{after:.2%}"
            )
        _restore(writer.linear, former, write)
    return f"left as it is, held-out error {fit.before:.2%}"


def _regression(fitted: FittedLayer, writer: _Writer) -> Regression:
    """Regression of the layer's residual on the features of one of its projections."""
    regression = Regression(fitted.name)
    for batch in fitted.batches(writer.linear):
        features = writer.features(batch.features)
        regression.add(batch.start, features, batch.residual, batch.target)
    return regression


def _restore(projection: nn.Linear, former: Sequence[Tensor], write: Write) -> None:
    for parameter, values in zip(projection.parameters(), former, strict=True):
        write(parameter, values)


def _add(projection: nn.Linear, change: Tensor | None, write: Write) -> None:
    """Add a change, ``(features, hidden)``, to a weight, and its last row to a bias."""
    if change is None:
        return
    rows = projection.in_features
    write(projection.weight, projection.weight.to(change) + change[:rows].T)
    if projection.bias is not None:
        write(projection.bias, projection.bias.to(change) + change[rows])
