"""Predict how far a shape diverges from what depth and width cost alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slm_plugin.lazy import np
from slm_plugin.pruners.hybrid.shapes import Shape

# What is known of the factors before a shape is measured: how far a may lie from 1 and b from 0;
# and the noise of a measured divergence in nats a token.
FACTORS = (0.5, 1.0)
NOISE = 0.03
# A measured divergence below this is taken for it where a power is fitted.
LEAST = 1e-6


@dataclass(frozen=True, slots=True)
class Curves:
    """Divergences from the model in nats a token, of layers and of widths alone.

    Attributes:
        dense: The shape of the model as it is.
        depth: Without so many layers, from 0 on.
        channels: With all layers, by the number of MLP channels.
        kv_groups: With all layers, by the number of KV groups.
    """

    dense: Shape
    depth: Sequence[float]
    channels: Mapping[int, float]
    kv_groups: Mapping[int, float]

    def of_depth(self, shape: Shape) -> float:
        """Without the layers that a shape lacks."""
        return self.depth[self.dense.layers - shape.layers]

    def of_width(self, shape: Shape) -> float:
        """With the width of a shape in all layers, as the sum of its channels and KV groups.

        Between the measured widths, it is taken to grow as a power of the share of channels that
        go.
        """
        return self._of_channels(shape.mlp_width) + self.kv_groups.get(shape.kv_groups, 0.0)

    def _of_channels(self, width: int) -> float:
        whole = self.dense.mlp_width
        if width in self.channels:
            return self.channels[width]
        gone = {whole - kept: found for kept, found in self.channels.items()}
        return by_power(gone, whole - width)


def by_power(measured: Mapping[int, float], gone: int) -> float:
    """The divergence without so many channels, as a power of their number.

    The power is that of the two measured numbers that lie nearest; with one of them it is 1.

    Args:
        measured: Divergences in nats a token, by the number of channels that go; one or more.
        gone: Channels that go.
    """
    if gone == 0:
        return 0.0
    if len(measured) == 1:
        ((number, found),) = measured.items()
        return max(found, LEAST) * gone / number
    low, high = sorted(sorted(measured, key=lambda one: abs(one - gone))[:2])
    start, end = (max(measured[number], LEAST) for number in (low, high))
    power = math.log(end / start) / math.log(high / low)
    return float(start * (gone / low) ** power)


@dataclass(frozen=True, slots=True)
class DivergenceModel:
    """The divergence of a shape: ``a D + V l/L + b D V``, in nats a token.

    D is what the layers cost that are gone, V what the width would cost in all L layers, l the
    number of layers left. The factors a and b are 1 and 0 until hybrid shapes are measured.

    Source: the product of both costs models their interaction, which the additive scores of
        Puzzletron's integer programme leave out.
    """

    curves: Curves
    a: float = 1.0
    b: float = 0.0

    def divergence(self, shape: Shape) -> float:
        """The prediction."""
        depth, width, scaled = self._terms(shape)
        return self.a * depth + scaled + self.b * depth * width

    def fitted(self, measured: Mapping[Shape, float]) -> DivergenceModel:
        """The model with the most likely factors: measured shapes and what is known before.

        Args:
            measured: Divergences; shapes with all layers tell nothing about the factors.
        """
        terms = [(*self._terms(shape), found) for shape, found in measured.items()]
        told = [one for one in terms if one[0] > 0]
        if not told:
            return self
        rows = [(depth, depth * width) for depth, width, _, _ in told]
        wanted = [found - scaled for _, _, scaled, found in told]
        return DivergenceModel(self.curves, *likely_factors(rows, wanted, (1.0, 0.0), FACTORS))

    def _terms(self, shape: Shape) -> tuple[float, float, float]:
        """D, V and V l/L."""
        depth, width = self.curves.of_depth(shape), self.curves.of_width(shape)
        return depth, width, width * shape.layers / self.curves.dense.layers


def likely_factors(
    rows: Sequence[Sequence[float]],
    measured: Sequence[float],
    expected: Sequence[float],
    spread: Sequence[float],
) -> list[float]:
    """The most likely factors of a sum that gives what is measured, by least squares.

    Args:
        rows: What the factors are multiplied by, for everything measured; one or more.
        measured: Divergences in nats a token, with `NOISE` for their noise.
        expected: The factors before anything is measured.
        spread: How far each may lie from that.
    """
    prior = np.diag(1 / np.array(spread))
    columns = np.vstack([np.array(rows) / NOISE, prior])
    values = np.concatenate([np.array(measured) / NOISE, prior @ np.array(expected)])
    found: list[float] = np.linalg.lstsq(columns, values, rcond=None)[0].tolist()
    return found
