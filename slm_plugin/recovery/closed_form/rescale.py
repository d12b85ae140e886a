"""Repair of the residual stream's length: what is written to it below a gap is scaled.

Source: Prune&Comp (arXiv 2507.18212).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from operator import mul
from typing import TYPE_CHECKING, ClassVar

from slm_plugin.errors import NumericalError
from slm_plugin.lazy import no_grad, torch
from slm_plugin.models.view import DecoderView, projections
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.recovery.closed_form.boundaries import (
    NOTHING_MISSING,
    gaps,
    place_name,
    reference_of,
)
from slm_plugin.recovery.closed_form.layer_walk import Ascent, Sight
from slm_plugin.recovery.closed_form.rewriting import rewriting
from slm_plugin.registry import register_recovery

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session


@register_recovery("rescale")
class Rescale(Recovery):
    """Make the residual stream behind every gap as long as it was in the dense model.

    The factor is the mean over tokens of |X*| / |X|. Embedding, ``o_proj`` and ``down_proj`` below
    the gap are multiplied by it; RMSNorm makes the layers there blind to the change.
    """

    reference: ClassVar[bool] = True

    @no_grad
    def recover(self, session: Session) -> RecoveryRecord:
        """Measure from the bottom up, each gap behind the rescaled lower ones, then scale.

        Raises:
            CalibrationError: No reference was kept.
            UnsupportedModelError: The residual stream has another width than the reference's.
            NumericalError: NaN or infinity, or states that are zero; the model keeps its weights.
        """
        reference = reference_of(session, self.name)
        places = gaps(session)
        top = len(session.sources) - 1
        factors: dict[int, float] = {}
        notes = [] if places else [NOTHING_MISSING]
        ascent = Ascent(session, reference)
        inner = [position for position in places if position != top]
        for position in ascent.visit(inner, f"{self.name}: layers"):
            gap = _measure(ascent.arrived(), place_name(position))
            factors[position] = gap.factor
            ascent.transform(partial(mul, gap.factor))
            notes.append(f"{place_name(position)}: {gap.describe()}")
        if top in places:
            notes.append(f"layer {top}: left as it is, the final norm above is blind to length")
        _scale(session.view, factors)
        return RecoveryRecord(
            recovery=self.name, options=self.options.model_dump(), notes=tuple(notes)
        )


@dataclass(frozen=True, slots=True)
class _Gap:
    """The factor, and the error before and after as a share of the norm of what is wanted."""

    factor: float
    before: float
    after: float

    def describe(self) -> str:
        """Factor and errors in words."""
        return f"length times {self.factor:.4g}, error {self.before:.2%} to {self.after:.2%}"


def _measure(sights: Iterable[Sight], where: str) -> _Gap:
    """Compare states with those wanted, batch after batch."""
    ratios = tokens = 0.0
    # Squared norm of the state, its product with the target, squared norm of the target.
    squares = torch.zeros(3, dtype=torch.float64)
    for sight in sights:
        now, wanted = sight.output.cpu().double(), sight.target.cpu().double()
        ratios += float((wanted.norm(dim=-1) / now.norm(dim=-1)).sum())
        tokens += now[..., 0].numel()
        squares += torch.stack([now.square().sum(), (now * wanted).sum(), wanted.square().sum()])
    factor = ratios / tokens
    if not (math.isfinite(factor) and factor > 0):
        raise NumericalError(
            f"the states behind {where} are NaN, infinite or zero",
            hint="load the model in float32 or bfloat16 and check its weights",
        )

    def error(scale: float) -> float:
        weights = torch.tensor([scale * scale, -2 * scale, 1.0], dtype=torch.float64)
        return math.sqrt(float((weights @ squares).clamp_min(0) / squares[2]))

    return _Gap(factor, error(1.0), error(factor))


def _scale(view: DecoderView, factors: dict[int, float]) -> None:
    """Scale all that is written to the residual stream by the factors of the gaps above it."""
    with rewriting() as write:

        def scale(parameter: Tensor | None, factor: float) -> None:
            if parameter is not None and factor != 1.0:
                write(parameter, parameter.double() * factor)

        everything = math.prod(factors.values())
        scale(view.embedding.weight, everything)
        if view.tied:
            # The head reads the same matrix and must not feel it.
            scale(view.norm.get_parameter("weight"), 1 / everything)
        for position, layer in enumerate(view.layers):
            factor = math.prod(f for gap, f in factors.items() if gap >= position)
            for name in ("o_proj", "down_proj"):
                linear = projections(layer)[name]
                scale(linear.weight, factor)
                scale(linear.bias, factor)
