"""Time of a decoder by its shape: a linear model with terms that are not negative."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

from slm_plugin.lazy import np
from slm_plugin.pruners.hybrid.shapes import AnyShape, Shape

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Which terms are fitted first where the shapes do not determine all: per layer, per MLP channel,
# outside the layers, per KV group. By their places in `TimeModel`.
_ORDER = (1, 3, 0, 2)


@dataclass(frozen=True, slots=True)
class TimeModel:
    """Seconds of one prefill, or of the decoding, of a workload.

    ::

        seconds = fixed + layers * (per_layer + per_kv_group * kv_groups + per_channel * mlp_width)

    The attention of a layer costs by its KV groups and the MLP by its channels: all other sizes
    are those of the model. Embedding, head and what a call costs are ``fixed``.

    Source: the cost model of NVIDIA's Puzzletron has a time for every variant of a block; here
    variants are uniform and lie on a plane, so that eight measured shapes are enough.

    Attributes:
        fixed: Seconds outside the layers.
        per_layer: Seconds of a layer whatever its width.
        per_kv_group: Seconds of one KV group of a layer.
        per_channel: Seconds of one MLP channel of a layer.
    """

    fixed: float
    per_layer: float
    per_kv_group: float
    per_channel: float

    def seconds(self, shape: AnyShape) -> float:
        """Predicted time of a shape."""
        return float(np.dot(_terms(shape), astuple(self)))


@dataclass(frozen=True, slots=True)
class Fit:
    """A time model and how well it explains what it was fitted to.

    Attributes:
        model: The model.
        residuals: Predicted over measured time, minus 1, of every fitted shape.
    """

    model: TimeModel
    residuals: Mapping[Shape, float]

    @property
    def largest(self) -> float:
        """Largest absolute residual."""
        return max(map(abs, self.residuals.values()))


def fit(measured: Mapping[Shape, float]) -> Fit:
    """Fit the terms to measured times by relative least squares, none of them negative.

    What is minimised is ``sum((predicted / measured - 1) ** 2)``. A term that the shapes do not
    tell apart from others is 0: with one width, for example, the time of an MLP is a part of
    ``per_layer``.

    Args:
        measured: Seconds, above 0, of every shape; one or more.

    Raises:
        ValueError: There is no shape, or a time is not above 0.
    """
    if not measured or min(measured.values()) <= 0:
        raise ValueError("a time model is fitted to one shape or more, with times above 0")
    shapes = list(measured)
    seconds = np.array([measured[shape] for shape in shapes])
    relative = np.array([_terms(shape) for shape in shapes]) / seconds[:, None]
    found = np.zeros(relative.shape[1])
    told = _independent(relative)
    found[told] = _non_negative(relative[:, told], np.ones(len(shapes)))
    model = TimeModel(*map(float, found))
    residuals = {shape: model.seconds(shape) / measured[shape] - 1 for shape in shapes}
    return Fit(model, residuals)


def _terms(shape: AnyShape) -> tuple[float, ...]:
    """What the terms of the model are multiplied by, in its order."""
    layers = shape.layers
    return 1.0, layers, layers * shape.kv_groups, shape.channels


def _independent(columns: NDArray[np.float64]) -> list[int]:
    """Columns that are no combination of those before them, in the order of `_ORDER`."""
    scaled = columns / np.linalg.norm(columns, axis=0)
    found: list[int] = []
    for index in _ORDER:
        if np.linalg.matrix_rank(scaled[:, [*found, index]], tol=1e-6) > len(found):
            found.append(index)
    return found


def _non_negative(columns: NDArray[np.float64], wanted: NDArray[np.float64]) -> NDArray[np.float64]:
    """Non-negative least squares, exactly, by trying every set of columns.

    On the columns that the optimum uses it is the plain least-squares solution, and there are only
    four columns.
    """
    count = columns.shape[1]
    best, least = np.zeros(count), float(wanted @ wanted)
    for used in map(list, _subsets(count)):
        scale = np.linalg.norm(columns[:, used], axis=0)
        solution = np.linalg.lstsq(columns[:, used] / scale, wanted, rcond=None)[0] / scale
        error = float(((columns[:, used] @ solution - wanted) ** 2).sum())
        if (solution >= 0).all() and error < least:
            best, least = np.zeros(count), error
            best[used] = solution
    return best


def _subsets(count: int) -> Iterable[tuple[int, ...]]:
    sizes = range(1, count + 1)
    return itertools.chain.from_iterable(itertools.combinations(range(count), n) for n in sizes)
