"""Refit of output projections, layer by layer from the bottom up, toward the dense model's states.

The fit of one layer is `slm_plugin.restoration.refitting`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from slm_plugin.component import Options
from slm_plugin.errors import UserError
from slm_plugin.lazy import no_grad
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.recovery.closed_form.layer_repair import repair_layers
from slm_plugin.registry import register_recovery
from slm_plugin.restoration.boundaries import boundaries, missing_below
from slm_plugin.restoration.refitting import refit_layer

if TYPE_CHECKING:
    from torch import nn

    from slm_plugin.models.families.family import Family
    from slm_plugin.models.view import DecoderView
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
    toward: Annotated[
        Literal["dense", "own"],
        Field(
            description="the dense model's states, or what each layer made of its present input "
            "before the last stage, if that was about width"
        ),
    ] = "dense"


@register_recovery("refit")
class Refit(Recovery):
    """Refit the output projections of the remaining layers.

    The target is the state of the dense model behind the layer or, with ``toward: own``, what the
    layer itself, before it was cut, makes of the input that it has now.
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

    @property
    def former_layers(self) -> bool:
        """Only for the targets of ``toward: own``."""
        return self.options.toward == "own"

    @no_grad
    def recover(self, session: Session) -> RecoveryRecord:
        """Refit from the bottom up, each layer on the outputs of the refitted ones below it.

        Raises:
            CalibrationError: The session has no reference, or it has fewer than 2 samples.
            UnsupportedModelError: The residual stream and the reference differ in width.
            UserError: The session did not keep the layers of before the last stage, or they read
                more hidden channels than are left.
            NumericalError: NaN or infinity; the model keeps its former weights.
        """
        former = None
        if self.former_layers:
            if not session.keeps_layers:
                raise UserError(
                    f"{self.name} needs the layers as they were before pruning",
                    hint="call `session.expect([recovery])` before the first stage",
                )
            former = session.former_layers
            _require_equal_streams(session.view, former)
        places = self._places(session)
        repair = partial(refit_layer, o_proj=self.options.o_proj)
        return repair_layers(self, session, places, repair, former)

    def _places(self, session: Session) -> list[int]:
        """Positions of the layers to refit; a layer with unchanged input is left out."""
        if self.former_layers and session.former_layers is None:
            return []
        places = boundaries(session)
        if self.options.layers == "boundaries":
            return places
        now, former = session.view.dimensions(), session.original
        narrower = now.layer_parameters != former.layer_parameters or now.layer_widths
        if narrower or missing_below(session):
            return list(range(len(session.sources)))
        return list(range(places[0], len(session.sources))) if places else []


def _require_equal_streams(view: DecoderView, former: list[nn.Module] | None) -> None:
    """Check that former layers can run on the present residual stream."""
    if not former:
        return
    there, here = (
        view.projections(layer)["down_proj"].out_features for layer in (former[0], view.layers[0])
    )
    if there != here:
        raise UserError(
            f"the layers before pruning read {there} hidden channels and {here} are left, so "
            "their outputs are no target",
            hint="use `toward: dense`",
        )
