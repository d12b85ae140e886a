"""Refit of output projections, layer by layer from the bottom up, toward the dense model's states.

Source: least-squares output matching as in SparseGPT (arXiv 2301.00774, section 3) and ReplaceMe
(arXiv 2505.02819), here with the pruned model's activations as features and the dense model's
states as target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from slm_plugin.component import Options
from slm_plugin.lazy import no_grad, torch
from slm_plugin.models.view import projections
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.recovery.closed_form.boundaries import boundaries, missing_below
from slm_plugin.recovery.closed_form.layer_walk import LayerWalk, repair_layers
from slm_plugin.recovery.closed_form.least_squares import Regression
from slm_plugin.recovery.closed_form.rewriting import Write
from slm_plugin.registry import register_recovery

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slm_plugin.session import Session


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
    """

    reference: ClassVar[bool] = True
    fewest_samples: ClassVar[int] = 2
    Options: ClassVar[type[RefitOptions]] = RefitOptions

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
        narrower = session.view.dimensions().layer_parameters != session.original.layer_parameters
        if narrower or missing_below(session):
            return list(range(len(session.sources)))
        return list(range(places[0], len(session.sources))) if places else []

    def _refit(self, walk: LayerWalk, write: Write) -> list[str]:
        """Refit one layer and return notes about it."""
        down = projections(walk.layer)["down_proj"]
        if not self.options.o_proj:
            fit = _regression(walk, down).solve()
            _add(down, fit.change, write)
            return [f"layer {walk.position}: {fit.describe()}"]
        out = projections(walk.layer)["o_proj"]
        first = _regression(walk, out)
        fit = first.solve()
        former = [parameter.clone() for parameter in out.parameters()]
        _add(out, fit.change, write)
        second = _regression(walk, down)
        said = fit.describe()
        # The fit assumes a fixed MLP output, but the MLP reads the new attention output.
        if second.residual > first.residual:
            for parameter, values in zip(out.parameters(), former, strict=True):
                write(parameter, values)
            second = _regression(walk, down)
            said += ", undone: the error after the MLP grew"
        last = second.solve()
        _add(down, last.change, write)
        where = f"layer {walk.position}"
        return [f"{where} o_proj: {said}", f"{where}: {last.describe()}"]


def _regression(walk: LayerWalk, projection: nn.Linear) -> Regression:
    """Regression of the layer's residual on the input of one of its projections."""
    regression = Regression(f"layer {walk.position}")
    for batch in walk.batches(projection):
        features = batch.features
        if projection.bias is not None:
            features = torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)
        regression.add(batch.start, features, batch.residual, batch.target)
    return regression


def _add(projection: nn.Linear, change: Tensor | None, write: Write) -> None:
    """Add a change, ``(features, hidden)``, to a weight, and its last row to a bias."""
    if change is None:
        return
    rows = projection.in_features
    write(projection.weight, projection.weight.to(change) + change[:rows].T)
    if projection.bias is not None:
        write(projection.bias, projection.bias.to(change) + change[rows])
