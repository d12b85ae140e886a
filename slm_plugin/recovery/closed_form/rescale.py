"""Repair of the residual stream's norm: the weights that write to it below a gap are scaled.

Source: Prune&Comp (arXiv 2507.18212).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from operator import mul
from typing import TYPE_CHECKING, Any, ClassVar

from slm_plugin.lazy import no_grad
from slm_plugin.models.view import DecoderView
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.registry import register_recovery
from slm_plugin.restoration.boundaries import (
    NOTHING_MISSING,
    gaps,
    place_name,
    reference_of,
)
from slm_plugin.restoration.layer_walk import LayerWalk
from slm_plugin.restoration.rescaling import measured_gap, unscalable
from slm_plugin.restoration.rewriting import rewriting

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.models.families.family import Family
    from slm_plugin.session import Session


@register_recovery("rescale")
class Rescale(Recovery):
    """Restore the mean norm of the residual stream after every gap.

    The factor is the mean over tokens of |X*| / |X|. Embedding, ``o_proj`` and ``down_proj`` below
    the gap are multiplied by it; the norms of those layers cancel the factor.
    """

    reference: ClassVar[bool] = True

    @classmethod
    def unsuited(cls, family: Family, config: Mapping[str, Any]) -> str:
        """All that enters the stream must come from weights that are scaled here."""
        return family.no_fit or unscalable(family)

    @no_grad
    def recover(self, session: Session) -> RecoveryRecord:
        """Measure all gaps from the bottom up, each with the lower ones rescaled, then rescale.

        Raises:
            CalibrationError: The session has no reference.
            UnsupportedModelError: The residual stream and the reference differ in width.
            NumericalError: NaN or infinity, or states that are zero; the model keeps its weights.
        """
        reference = reference_of(session, self.name)
        places = gaps(session)
        top = len(session.sources) - 1
        factors: dict[int, float] = {}
        notes = [] if places else [NOTHING_MISSING]
        walk = LayerWalk(session.view, reference, session.sources)
        inner = [position for position in places if position != top]
        for position in walk.visit(inner, f"{self.name}: layers"):
            gap = measured_gap(walk.inputs(), place_name(position))
            factors[position] = gap.factor
            walk.transform(partial(mul, gap.factor))
            notes.append(f"{place_name(position)}: {gap.describe()}")
        if top in places:
            notes.append(f"layer {top}: left as it is, the final norm cancels any factor")
        _scale(session.view, factors)
        return RecoveryRecord(
            recovery=self.name, options=self.options.model_dump(), notes=tuple(notes)
        )


def _scale(view: DecoderView, factors: dict[int, float]) -> None:
    """Scale every weight that writes to the residual stream by the factors of the gaps above it."""
    with rewriting() as write:

        def scale(parameter: Tensor | None, factor: float) -> None:
            if parameter is not None and factor != 1.0:
                write(parameter, parameter.double() * factor)

        everything = math.prod(factors.values())
        scale(view.embedding.weight, everything)
        if view.tied:
            # The output head shares this matrix, so the factor is divided out in the final norm.
            for _, parameter in view.norm.named_parameters():
                scale(parameter, 1 / everything)
        for position, layer in enumerate(view.layers):
            factor = math.prod(f for gap, f in factors.items() if gap >= position)
            for name in ("o_proj", "down_proj"):
                linear = view.projections(layer)[name]
                scale(linear.weight, factor)
                scale(linear.bias, factor)
