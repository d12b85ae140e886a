"""Refit of output projections, layer by layer from the bottom up, toward the dense model's states.

Source: least-squares output matching as in SparseGPT (arXiv 2301.00774, section 3) and ReplaceMe
(arXiv 2505.02819), here with the pruned model's activations as features and the dense model's
states as target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from slm_plugin.component import Options
from slm_plugin.lazy import F, no_grad, torch
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.recovery.closed_form.boundaries import boundaries, missing_below
from slm_plugin.recovery.closed_form.layer_walk import LayerWalk, repair_layers
from slm_plugin.recovery.closed_form.least_squares import Regression, share
from slm_plugin.recovery.closed_form.rewriting import Write
from slm_plugin.registry import register_recovery

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slm_plugin.models.families.family import Family
    from slm_plugin.session import Session


# Parts of the fitted change that are tried behind a norm.
STEPS = (1.0, 0.5, 0.25, 0.125)
# Of the largest gain of a norm.
SMALLEST_GAIN = 1e-2


class RefitOptions(Options):
    """Which projections are refitted."""

    layers: Annotated[
        Literal["all", "boundaries"],
        Field(description="every layer whose input changed, or only those before missing layers"),
    ] = "all"
    o_proj: Annotated[bool, Field(description="refit the attention's output before down_proj")] = (
        False
    )


@register_recovery("refit")
class Refit(Recovery):
    """Refit the output projections of the remaining layers.

    With Z the input of a projection in the pruned model, X the stream after its layer and X* that
    of the dense model there, the D that minimises ||Z D' - (X* - X)||^2 + a||D||^2 is added to its
    weight W: the ridge pulls toward the present weight. A bias is a constant column of Z.

    Where a norm stands behind the projection, as in Gemma, its division is held fixed for the fit,
    and the longest of a few steps that lowers the measured held-out error is taken.
    """

    reference: ClassVar[bool] = True
    fewest_samples: ClassVar[int] = 2
    Options: ClassVar[type[RefitOptions]] = RefitOptions

    @classmethod
    def unsuited(cls, family: Family, config: Mapping[str, Any]) -> str:
        """The projections to fit must be linear maps."""
        return family.no_fit

    def __init__(self, options: RefitOptions) -> None:
        super().__init__(options)
        self.options: RefitOptions = options

    @no_grad
    def recover(self, session: Session) -> RecoveryRecord:
        """Refit from the bottom up, each layer on the outputs of the refitted ones below it.

        Raises:
            CalibrationError: The session has no reference, or it has fewer than 2 samples.
            UnsupportedModelError: The residual stream and the reference differ in width.
            NumericalError: NaN or infinity; the model keeps its former weights.
        """
        return repair_layers(self, session, self._places(session), self._refit)

    def _places(self, session: Session) -> list[int]:
        """Positions of the layers to refit; a layer with unchanged input is left out."""
        places = boundaries(session)
        if self.options.layers == "boundaries":
            return places
        now, former = session.view.dimensions(), session.original
        narrower = now.layer_parameters != former.layer_parameters or now.layer_widths
        if narrower or missing_below(session):
            return list(range(len(session.sources)))
        return list(range(places[0], len(session.sources))) if places else []

    def _refit(self, walk: LayerWalk, write: Write) -> list[str]:
        """Refit one layer and return notes about it."""
        where = f"layer {walk.position}"
        if not self.options.o_proj:
            return [f"{where}: {_improve(walk, _Writer.of(walk, 'down_proj'), write)}"]
        out, down = (_Writer.of(walk, name) for name in ("o_proj", "down_proj"))
        first = _regression(walk, out).residual
        former = [parameter.clone() for parameter in out.linear.parameters()]
        said = _improve(walk, out, write)
        # The fit assumes a fixed MLP output, but the MLP reads the new attention output.
        if _regression(walk, down).residual > first:
            _restore(out.linear, former, write)
            said += ", undone: the error after the MLP grew"
        return [f"{where} o_proj: {said}", f"{where}: {_improve(walk, down, write)}"]


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
    def of(cls, walk: LayerWalk, name: str) -> _Writer:
        linear, norm = walk.projections[name], walk.norm_behind(name)
        if norm is None:
            return cls(linear, walk.multiplier)
        gain = norm.get_parameter("weight").double() + walk.family.gain_offset
        epsilon: Any = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", 0.0)
        return cls(linear, walk.multiplier, gain, float(epsilon))

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


def _improve(walk: LayerWalk, writer: _Writer, write: Write) -> str:
    """Refit one projection; behind a norm, with the longest step that lowers the error."""
    first = _regression(walk, writer)
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
        reached = _regression(walk, writer)
        if reached.residual < first.residual:
            after = share(reached.residual, reached.target)
            return (
                f"ridge {fit.ridge:g}, step {step:g}, held-out error {fit.before:.2%} to "
                f"{after:.2%}"
            )
        _restore(writer.linear, former, write)
    return f"left as it is, held-out error {fit.before:.2%}"


def _regression(walk: LayerWalk, writer: _Writer) -> Regression:
    """Regression of the layer's residual on the features of one of its projections."""
    regression = Regression(f"layer {walk.position}")
    for batch in walk.batches(writer.linear):
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
