"""Choose a width for every layer, or its removal, and measure the best choices."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING

from slm_plugin.cache import Store
from slm_plugin.plans import DropLayers, Operation, UnitScores
from slm_plugin.pruners.hybrid.allotment import Allotment
from slm_plugin.pruners.hybrid.choice import Choice, Divergences, verified
from slm_plugin.pruners.hybrid.prediction import likely_factors
from slm_plugin.pruners.hybrid.programme import cheapest
from slm_plugin.pruners.hybrid.shapes import MixedShape
from slm_plugin.pruners.width.budget import Cut
from slm_plugin.pruners.width.uniform import operations_of

if TYPE_CHECKING:
    from slm_plugin.models.dimensions import Dimensions
    from slm_plugin.session import Session

# A layer has at most so many sizes to choose from between nothing and its whole width.
MOST_SIZES = 64
# What is known of the factors before a choice is measured; see `_model`.
_EXPECTED, _SPREAD = (1.0, 1.0, 0.0), (0.5, 0.5, 1.0)

# By layer, what `layer_increases` gives by the width that it keeps; width 0 is without the layer.
Increases = Sequence[Mapping[int, float]]


def chosen_widths(
    session: Session,
    allotments: Sequence[Allotment],
    increases: Increases,
    scores: Sequence[UnitScores],
    verify: int,
    journal: Store,
) -> Choice:
    """Choose a width for every layer, or its removal.

    For every number of layers the programme gives the widths of least summed increase. What is
    measured of these corrects the sums, which leave out how changes of layers add up.

    Args:
        session: Holds the model, which stays as it is.
        allotments: What the target leaves, by the number of layers.
        increases: What the widths of single layers cost; see `layer_increases`.
        scores: Scores of the units of every layer.
        verify: Number of choices that are measured.
        journal: Where the divergences are stored.

    Raises:
        CalibrationError: There are fewer than 2 samples.
        NumericalError: NaN or infinity, or the solver fails.
    """
    before = session.view.dimensions()
    solved = (cheapest(increases, allotment) for allotment in allotments)
    shapes = [MixedShape(widths, before.kv_heads) for widths in solved if widths is not None]
    made = partial(operations_for, before=before, increases=increases, scores=scores)
    divergences = Divergences(session, journal, made)
    return verified(shapes, verify, divergences, scores, partial(_model, increases))


def operations_for(
    shape: MixedShape, before: Dimensions, increases: Increases, scores: Sequence[UnitScores]
) -> tuple[Operation, ...]:
    """What makes a shape of a model: layers are dropped first, the cheapest before the others.

    Args:
        shape: The shape.
        before: Dimensions of the model.
        increases: What the widths of single layers cost; see `layer_increases`.
        scores: Scores of the units of every layer.
    """
    dropped = [layer for layer, width in enumerate(shape.widths) if not width]
    dropped.sort(key=lambda layer: increases[layer][0])
    kept = [width or before.intermediate_size for width in shape.widths]
    cut = Cut.keeping(kept, 0, before)
    inside = (operations_of(units, cut, before) for units in scores if shape.widths[units.layer])
    return (*(DropLayers(indices=(layer,)) for layer in dropped), *chain.from_iterable(inside))


def summed(shape: MixedShape, increases: Increases) -> tuple[float, float]:
    """The increases of the removed layers, and those of the layers that are left."""
    every = [of[width] for of, width in zip(increases, shape.widths, strict=True)]
    depth = sum(cost for cost, width in zip(every, shape.widths, strict=True) if not width)
    return depth, sum(every) - depth


def _model(
    increases: Increases, measured: Mapping[MixedShape, float]
) -> Callable[[MixedShape], float]:
    """Predicts ``a D + c V + b D V``, in nats a token.

    D is the sum of the increases of the removed layers, V that of the others. The factors
    are 1, 1 and 0 until something is measured.
    """

    def terms(shape: MixedShape) -> tuple[float, float, float]:
        depth, width = summed(shape, increases)
        return depth, width, depth * width

    factors: Sequence[float] = _EXPECTED
    if measured:
        rows = list(map(terms, measured))
        factors = likely_factors(rows, list(measured.values()), _EXPECTED, _SPREAD)
    return lambda shape: sum(f * term for f, term in zip(factors, terms(shape), strict=True))
