"""Predict how far shapes diverge, measure the best, and choose among these."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from functools import cached_property, partial
from itertools import chain
from statistics import fmean, stdev
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from slm_plugin.cache import Store
from slm_plugin.calibration.held_out import held_out
from slm_plugin.plans import DepthOperation, Operation, UnitScores
from slm_plugin.plans.operations import by_kind
from slm_plugin.plans.steps import remaining_layers
from slm_plugin.pruners.hybrid.divergence import Divergence
from slm_plugin.pruners.hybrid.prediction import Curves, DivergenceModel
from slm_plugin.pruners.hybrid.repaired_states import repaired_states
from slm_plugin.pruners.hybrid.shapes import AnyShape, MixedShape, Shape
from slm_plugin.pruners.width.budget import Cut
from slm_plugin.pruners.width.uniform import operations_of

if TYPE_CHECKING:
    from slm_plugin.models.dimensions import Dimensions
    from slm_plugin.pruners.depth.search.repaired_trials import Judged
    from slm_plugin.session import Session


ShapeT = TypeVar("ShapeT", Shape, MixedShape)


@dataclass(frozen=True, slots=True)
class Choice:
    """The chosen shape, and all that it was chosen from.

    Attributes:
        best: The measured shape of least divergence.
        operations: What makes it of the model.
        scores: Scores of the units of the layers that are left.
        predicted: Predicted divergence of every shape from the model, in nats a token; of a
            measured one that from before its measurement.
        measured: Measured divergence of some, on the held-out samples, after the restoration.
        notes: What was predicted and measured of the best, and how far the next best lies behind,
            beside the noise of the samples.
    """

    best: AnyShape
    operations: tuple[Operation, ...]
    scores: tuple[UnitScores, ...]
    predicted: Mapping[AnyShape, float]
    measured: Mapping[AnyShape, float]
    notes: tuple[str, ...]


def chosen(
    session: Session,
    shapes: Sequence[Shape],
    order: Sequence[Judged],
    scores: Sequence[UnitScores],
    verify: int,
    journal: Store,
) -> Choice:
    """Choose a shape.

    Two widths without fewer layers, and every number of KV groups, are measured first. After that
    the shape of least predicted divergence is measured again and again, each time with all that is
    measured in the prediction.

    Args:
        session: Holds the model, which stays as it is.
        shapes: The shapes that meet the target.
        order: The layers in the order in which they go, by the divergence; none where all shapes
            have all layers.
        scores: Scores of the units of every layer.
        verify: Number of shapes that meet the target and are measured.
        journal: Where the divergences are stored.

    Raises:
        CalibrationError: There are fewer than 2 samples.
        NumericalError: NaN or infinity.
    """
    before = session.view.dimensions()
    dense = Shape.of(before)
    drops = [judged.candidate.run.operation for judged in order]
    made = partial(operations_for, before=before, drops=drops, scores=scores)
    divergences = Divergences(session, journal, made)
    curves = Curves(
        dense,
        depth=[0.0, *(-judged.value for judged in order)],
        channels={w: divergences.of(replace(dense, mlp_width=w)) for w in _widths(dense, shapes)},
        kv_groups={k: divergences.of(replace(dense, kv_groups=k)) for k in _groups(dense, shapes)},
    )
    model = DivergenceModel(curves)
    return verified(
        shapes, verify, divergences, scores, lambda found: model.fitted(found).divergence
    )


def verified(
    shapes: Sequence[ShapeT],
    verify: int,
    divergences: Divergences[ShapeT],
    scores: Sequence[UnitScores],
    model: Callable[[Mapping[ShapeT, float]], Callable[[ShapeT], float]],
) -> Choice:
    """Measure what is predicted best, again and again, and choose among the measured.

    Args:
        shapes: The shapes that meet the target.
        verify: Number of them that are measured.
        divergences: Measures; those of shapes that it has measured already count.
        scores: Scores of the units of every layer.
        model: Predicts divergences, from all that are measured.

    Raises:
        CalibrationError: There are fewer than 2 samples.
        NumericalError: NaN or infinity.
    """
    predicted: dict[ShapeT, float] = {}
    known = divergences.found
    measured: dict[ShapeT, float] = {one: known[one] for one in shapes if one in known}
    while len(measured) < min(verify, len(shapes)):
        expected = model(known)
        left = [shape for shape in shapes if shape not in measured]
        nearest = min(left, key=lambda shape: (expected(shape), shape))
        predicted[nearest] = expected(nearest)
        measured[nearest] = divergences.of(nearest)
    expected = model(known)
    every: dict[AnyShape, float] = {one: predicted.get(one, expected(one)) for one in shapes}
    tried: dict[AnyShape, float] = {one: measured[one] for one in measured}
    best: ShapeT = min(measured, key=lambda shape: (measured[shape], shape))
    operations = divergences.made(best)
    named = {operation.layer for operation in by_kind(operations)[1]}
    kept = tuple(units for units in scores if units.layer in named)
    told = (
        f"KL to the model before: predicted {every[best]:.3f}, measured {measured[best]:.3f} "
        "nats a token, on the held-out samples"
    )
    notes = (told, *_verdict(best, measured, divergences))
    return Choice(best, operations, kept, every, tried, notes)


def operations_for(
    shape: Shape,
    before: Dimensions,
    drops: Sequence[DepthOperation],
    scores: Sequence[UnitScores],
) -> tuple[Operation, ...]:
    """What makes a shape of a model: layers go first, then units of those that are left.

    Args:
        shape: The shape.
        before: Dimensions of the model.
        drops: The operations that drop a layer, in their order.
        scores: Scores of the units of every layer.
    """
    dense = Shape.of(before)
    depth = drops[: dense.layers - shape.layers]
    left = {*remaining_layers(depth, dense.layers)}
    cut = Cut(dense.mlp_width - shape.mlp_width, dense.kv_groups - shape.kv_groups)
    kept = (operations_of(units, cut, before) for units in scores if units.layer in left)
    return (*depth, *chain.from_iterable(kept))


def _widths(dense: Shape, shapes: Sequence[Shape]) -> list[int]:
    """The widths that are measured alone: the smallest, and one half way to it."""
    least = min(shape.mlp_width for shape in shapes)
    middle = max((s.mlp_width for s in shapes), key=lambda w: -abs(2 * w - least - dense.mlp_width))
    return sorted({least, middle} - {dense.mlp_width})


def _groups(dense: Shape, shapes: Sequence[Shape]) -> list[int]:
    return sorted({shape.kv_groups for shape in shapes} - {dense.kv_groups})


def _verdict(
    best: ShapeT, measured: Mapping[ShapeT, float], divergences: Divergences[ShapeT]
) -> Iterator[str]:
    """The difference to the next best shape, with its standard error over the samples."""
    others = [shape for shape in measured if shape != best]
    if not others:
        return
    second = min(others, key=lambda shape: (measured[shape], shape))
    pairs = zip(divergences.samples(second), divergences.samples(best), strict=True)
    gaps = [one - other for one, other in pairs]
    told = f"the next best, {second.said}, lies {fmean(gaps):.3f} nats a token behind"
    if len(gaps) < 2:
        yield f"{told}, on one held-out sample"
        return
    noise = stdev(gaps) / math.sqrt(len(gaps))
    yield f"{told}, standard error {noise:.3f} over {len(gaps)} held-out samples"


class Divergences(Generic[ShapeT]):
    """Measured divergences of shapes from the model, stored as soon as they are measured.

    Attributes:
        made: The operations that make a shape of the model.
        found: Those that are known, in nats a token.

    Args:
        session: Holds the model, which stays as it is.
        journal: Where they are stored.
        made: The operations that make a shape of the model.
    """

    def __init__(
        self,
        session: Session,
        journal: Store,
        made: Callable[[ShapeT], tuple[Operation, ...]],
    ) -> None:
        self._session, self._journal = session, journal
        self.made: Callable[[ShapeT], tuple[Operation, ...]] = made
        self.found: dict[ShapeT, float] = {}

    @cached_property
    def _model(self) -> Divergence:
        final = held_out(batch.final for batch in self._session.captured())
        return Divergence(final, self._session.view.logits)

    def samples(self, shape: ShapeT) -> list[float]:
        """The divergence of a shape on every held-out sample, after its restoration."""
        key = list(astuple(shape))
        stored = self._journal.find(key)
        if stored is None:
            stored = self._model.samples(repaired_states(self._session, self.made(shape)))
            self._journal.store(key, stored)
        return list(map(float, stored))

    def of(self, shape: ShapeT) -> float:
        """The mean of these, in nats a token."""
        if shape not in self.found:
            self.found[shape] = fmean(self.samples(shape))
        return self.found[shape]


def is_measured(key: Any, value: Any) -> bool:
    """Whether a line of the journal holds a shape and the divergences of samples."""
    numbers = (*key[0], key[1]) if len(key) == 2 else key
    shape = len(key) in (2, 3) and all(type(one) is int for one in numbers)
    listed = isinstance(value, list) and bool(value)
    return shape and listed and all(math.isfinite(one) and one >= 0 for one in value)
