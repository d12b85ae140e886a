"""Predict the losses of shapes, measure the best, and choose among these."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property, partial
from itertools import chain
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any

from slm_plugin.cache import Store
from slm_plugin.plans import Operation, PruningPlan, UnitScores
from slm_plugin.plans.operations import by_kind
from slm_plugin.plans.steps import remaining_layers
from slm_plugin.pruners.hybrid.prediction import Curves, LossModel
from slm_plugin.pruners.hybrid.repaired_loss import held_out_losses, repaired_losses
from slm_plugin.pruners.hybrid.shapes import Shape
from slm_plugin.pruners.width.budget import Cut
from slm_plugin.pruners.width.uniform import operations_of

if TYPE_CHECKING:
    from slm_plugin.models.dimensions import Dimensions
    from slm_plugin.session import Session


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen shape, and all that it was chosen from.

    Attributes:
        best: The measured shape of least loss.
        operations: What makes it of the model.
        scores: Scores of the units of the layers that are left.
        predicted: Predicted increase of the loss of every shape, in nats a token; of a measured one
            that from before its measurement.
        measured: Measured increase of some, on the held-out samples, after the restoration.
        verdict: How far the next best lies behind, beside the noise of the samples; empty where
            one shape was measured.
    """

    best: Shape
    operations: tuple[Operation, ...]
    scores: tuple[UnitScores, ...]
    predicted: Mapping[Shape, float]
    measured: Mapping[Shape, float]
    verdict: str


def chosen(
    session: Session,
    shapes: Sequence[Shape],
    order: PruningPlan | None,
    scores: Sequence[UnitScores],
    verify: int,
    journal: Store,
) -> Choice:
    """Choose a shape.

    Two widths without fewer layers, and every number of KV groups, are measured first. After that
    the shape of least predicted loss is measured again and again, each time with all that is
    measured in the prediction.

    Args:
        session: Holds the model, which stays as it is.
        shapes: The shapes that meet the target.
        order: The plan of a search for layers, whose beginnings are the plans of fewer; None where
            all shapes have all layers.
        scores: Scores of the units of every layer.
        verify: Number of shapes that meet the target and are measured.
        journal: Where the losses are stored.

    Raises:
        CalibrationError: There are fewer than 2 samples.
        NumericalError: NaN or infinity.
    """
    before = session.view.dimensions()
    dense = Shape.of(before)
    made = partial(operations_for, before=before, order=order, scores=scores)
    losses = _Losses(session, journal, made)
    curves = Curves(
        dense,
        depth=[0.0] if order is None else [0.0, *(-trial.similarity for trial in order.trials)],
        channels={w: losses.of(replace(dense, mlp_width=w)) for w in _widths(dense, shapes)},
        kv_groups={k: losses.of(replace(dense, kv_groups=k)) for k in _groups(dense, shapes)},
    )
    predicted: dict[Shape, float] = {}
    measured = {shape: losses.found[shape] for shape in shapes if shape in losses.found}
    while len(measured) < min(verify, len(shapes)):
        model = LossModel(curves).fitted(losses.found)
        left = [shape for shape in shapes if shape not in measured]
        nearest = min(left, key=lambda shape: (model.loss(shape), shape))
        predicted[nearest] = model.loss(nearest)
        measured[nearest] = losses.of(nearest)
    model = LossModel(curves).fitted(losses.found)
    predicted = {shape: predicted.get(shape, model.loss(shape)) for shape in shapes}
    best = min(measured, key=lambda shape: (measured[shape], shape))
    operations = made(best)
    named = {operation.layer for operation in by_kind(operations)[1]}
    kept = tuple(units for units in scores if units.layer in named)
    return Choice(best, operations, kept, predicted, measured, _verdict(best, measured, losses))


def operations_for(
    shape: Shape, before: Dimensions, order: PruningPlan | None, scores: Sequence[UnitScores]
) -> tuple[Operation, ...]:
    """What makes a shape of a model: layers go first, then units of those that are left.

    Args:
        shape: The shape.
        before: Dimensions of the model.
        order: The plan of a search for layers.
        scores: Scores of the units of every layer.
    """
    dense = Shape.of(before)
    found = () if order is None else order.operations[: dense.layers - shape.layers]
    depth, _ = by_kind(found)
    left = {*remaining_layers(depth, dense.layers)}
    cut = Cut(dense.mlp_width - shape.mlp_width, dense.kv_groups - shape.kv_groups)
    kept = (operations_of(units, cut, before) for units in scores if units.layer in left)
    return (*depth, *chain.from_iterable(kept))


def _widths(dense: Shape, shapes: Sequence[Shape]) -> list[int]:
    """The widths whose loss is measured alone: the smallest, and one half way to it."""
    least = min(shape.mlp_width for shape in shapes)
    middle = max((s.mlp_width for s in shapes), key=lambda w: -abs(2 * w - least - dense.mlp_width))
    return sorted({least, middle} - {dense.mlp_width})


def _groups(dense: Shape, shapes: Sequence[Shape]) -> list[int]:
    return sorted({shape.kv_groups for shape in shapes} - {dense.kv_groups})


def _verdict(best: Shape, measured: Mapping[Shape, float], losses: _Losses) -> str:
    """The difference to the next best shape, with its standard error over the samples."""
    others = [shape for shape in measured if shape != best]
    if not others:
        return ""
    second = min(others, key=lambda shape: (measured[shape], shape))
    pairs = zip(losses.samples(second), losses.samples(best), strict=True)
    gaps = [one - other for one, other in pairs]
    told = (
        f"the next best, {second.layers} layers with {second.mlp_width:,} MLP channels, lies "
        f"{fmean(gaps):.3f} nats a token behind"
    )
    if len(gaps) < 2:
        return f"{told}, on one held-out sample"
    noise = stdev(gaps) / math.sqrt(len(gaps))
    return f"{told}, standard error {noise:.3f} over {len(gaps)} held-out samples"


class _Losses:
    """Measured increases of the loss over the model's, stored as soon as they are measured."""

    def __init__(
        self,
        session: Session,
        journal: Store,
        made: Callable[[Shape], tuple[Operation, ...]],
    ) -> None:
        self._session, self._journal, self._made = session, journal, made
        self.found: dict[Shape, float] = {}

    @cached_property
    def _dense(self) -> float:
        final = [batch.final for batch in self._session.captured()]
        return fmean(held_out_losses(self._session, final))

    def samples(self, shape: Shape) -> list[float]:
        """The losses of a shape on the held-out samples, after its restoration."""
        key = list(astuple(shape))
        stored = self._journal.find(key)
        if stored is None:
            stored = repaired_losses(self._session, self._made(shape))
            self._journal.store(key, stored)
        return list(map(float, stored))

    def of(self, shape: Shape) -> float:
        """The increase of the mean of these, in nats a token."""
        if shape not in self.found:
            self.found[shape] = fmean(self.samples(shape)) - self._dense
        return self.found[shape]


def is_loss(key: Any, value: Any) -> bool:
    """Whether a line of the journal holds a shape and finite losses of samples."""
    shape = len(key) == 3 and all(isinstance(one, int) for one in key)
    return shape and isinstance(value, list) and bool(value) and all(map(math.isfinite, value))
