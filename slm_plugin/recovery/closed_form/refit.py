"""Refit of output projections, layer by layer from the bottom up, toward the dense model's states.

Source: least-squares output matching as in SparseGPT (arXiv 2301.00774, section 3) and ReplaceMe
(arXiv 2505.02819), here with the inner activations of the pruned model and the dense model's states
as target.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from slm_plugin.lazy import no_grad, torch
from slm_plugin.models.view import projections
from slm_plugin.recovery.base import Recovery, RecoveryOptions, RecoveryRecord
from slm_plugin.recovery.closed_form.boundaries import boundaries, missing_below
from slm_plugin.recovery.closed_form.layer_walk import Ascent, repair_upwards
from slm_plugin.recovery.closed_form.least_squares import Regression
from slm_plugin.recovery.closed_form.rewriting import Write
from slm_plugin.registry import register_recovery

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slm_plugin.session import Session


class RefitOptions(RecoveryOptions):
    """Which projections are refitted."""

    layers: Annotated[
        Literal["all", "boundaries"],
        Field(description="every layer whose input changed, or only those behind which layers go"),
    ] = "all"
    o_proj: Annotated[bool, Field(description="refit the attention's output before down_proj")] = (
        False
    )


@register_recovery("refit")
class Refit(Recovery):
    """Refit the output projections of the layers that are left.

    With Z what a projection sees in the pruned model, X the stream behind its layer and X* what the
    dense model had there, its weight W gains the D that minimises ||Z D' - (X* - X)||^2 + a||D||^2:
    the ridge pulls toward the present weight. A bias is a further column of Z that is always 1.
    """

    reference: ClassVar[bool] = True
    fewest_samples: ClassVar[int] = 2
    Options: ClassVar[type[RefitOptions]] = RefitOptions

    def __init__(self, options: RefitOptions) -> None:
        super().__init__(options)
        self.options: RefitOptions = options

    @no_grad
    def recover(self, session: Session) -> RecoveryRecord:
        """Refit from the bottom up, each layer on what the refitted ones below it compute.

        Raises:
            CalibrationError: No reference was kept, or it has fewer than 2 samples.
            UnsupportedModelError: The residual stream has another width than the reference's.
            NumericalError: NaN or infinity; the model keeps its former weights.
        """
        return repair_upwards(self, session, self._places(session), self._refit)

    def _places(self, session: Session) -> list[int]:
        """Positions of the layers to refit; those whose input never changed need none."""
        places = boundaries(session)
        if self.options.layers == "boundaries":
            return places
        narrower = session.view.dimensions().layer_parameters != session.original.layer_parameters
        if narrower or missing_below(session):
            return list(range(len(session.sources)))
        return list(range(places[0], len(session.sources))) if places else []

    def _refit(self, ascent: Ascent, write: Write) -> list[str]:
        """Refit one layer and tell how it went."""
        down = projections(ascent.layer)["down_proj"]
        if not self.options.o_proj:
            fit = _regression(ascent, down).solve()
            _gain(down, fit.change, write)
            return [f"layer {ascent.position}: {fit.describe()}"]
        out = projections(ascent.layer)["o_proj"]
        first = _regression(ascent, out)
        fit = first.solve()
        former = [parameter.clone() for parameter in out.parameters()]
        _gain(out, fit.change, write)
        second = _regression(ascent, down)
        said = fit.describe()
        # The fit takes what the MLP adds as given; the MLP sees the new attention and may differ.
        if second.lack > first.lack:
            for parameter, values in zip(out.parameters(), former, strict=True):
                write(parameter, values)
            second = _regression(ascent, down)
            said += ", undone: the MLP answers it with more error"
        last = second.solve()
        _gain(down, last.change, write)
        where = f"layer {ascent.position}"
        return [f"{where} o_proj: {said}", f"{where}: {last.describe()}"]


def _regression(ascent: Ascent, projection: nn.Linear) -> Regression:
    """What the layer's output lacks, against what one of its projections sees."""
    regression = Regression(f"layer {ascent.position}")
    for sight in ascent.look(projection):
        features = sight.inner
        if projection.bias is not None:
            features = torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)
        regression.add(sight.start, features, sight.lack, sight.target)
    return regression


def _gain(projection: nn.Linear, change: Tensor | None, write: Write) -> None:
    """Add a change, ``(features, hidden)``, to a weight, and its last row to a bias."""
    if change is None:
        return
    rows = projection.in_features
    write(projection.weight, projection.weight.to(change) + change[:rows].T)
    if projection.bias is not None:
        write(projection.bias, projection.bias.to(change) + change[rows])
