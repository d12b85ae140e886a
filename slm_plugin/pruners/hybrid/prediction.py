"""Predict the loss of a shape from what depth and width cost alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from slm_plugin.lazy import np
from slm_plugin.pruners.hybrid.shapes import Shape

# What is known of the factors before a shape is measured: how far a may lie from 1 and b from 0;
# and the noise of a measured loss in nats a token, that of a thousand held-out tokens.
FACTORS = (0.5, 1.0)
NOISE = 0.03


@dataclass(frozen=True, slots=True)
class Curves:
    """Increases of the loss in nats a token, of layers and of widths alone.

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

        Between the measured widths, the loss is taken to grow as a power of the share of channels
        that go.
        """
        return self._of_channels(shape.mlp_width) + self.kv_groups.get(shape.kv_groups, 0.0)

    def _of_channels(self, width: int) -> float:
        whole = self.dense.mlp_width
        if width == whole:
            return 0.0
        if width in self.channels:
            return self.channels[width]
        gone = {whole - kept: max(loss, 1e-6) for kept, loss in self.channels.items()}
        if len(gone) == 1:
            ((measured, loss),) = gone.items()
            return loss * (whole - width) / measured
        # The two measured widths that lie nearest.
        low, high = sorted(sorted(gone, key=lambda one: abs(one - (whole - width)))[:2])
        power = math.log(gone[high] / gone[low]) / math.log(high / low)
        return float(gone[low] * ((whole - width) / low) ** power)


@dataclass(frozen=True, slots=True)
class LossModel:
    """The loss of a shape: ``a D + V l/L + b D V``, in nats a token above the model's.

    D is what the layers cost that are gone, V what the width would cost in all L layers, l the
    number of layers left. The factors a and b are 1 and 0 until hybrid shapes are measured.

    Source: the product of both costs models their interaction, which the additive scores of
        Puzzletron's integer programme leave out.
    """

    curves: Curves
    a: float = 1.0
    b: float = 0.0

    def loss(self, shape: Shape) -> float:
        """The predicted increase."""
        depth, width, scaled = self._terms(shape)
        return self.a * depth + scaled + self.b * depth * width

    def fitted(self, measured: Mapping[Shape, float]) -> LossModel:
        """The model with the most likely factors: measured shapes and what is known before.

        Args:
            measured: Increases of the loss; shapes with all layers tell nothing about the factors.
        """
        terms = [(*self._terms(shape), loss) for shape, loss in measured.items()]
        told = [one for one in terms if one[0] > 0]
        if not told:
            return self
        rows = np.array([[depth, depth * width] for depth, width, _, _ in told]) / NOISE
        wanted = np.array([loss - scaled for _, _, scaled, loss in told]) / NOISE
        prior = np.diag(1 / np.array(FACTORS))
        columns = np.vstack([rows, prior])
        values = np.concatenate([wanted, prior @ np.array([1.0, 0.0])])
        found = np.linalg.lstsq(columns, values, rcond=None)[0]
        return LossModel(self.curves, float(found[0]), float(found[1]))

    def _terms(self, shape: Shape) -> tuple[float, float, float]:
        """D, V and V l/L."""
        depth, width = self.curves.of_depth(shape), self.curves.of_width(shape)
        return depth, width, width * shape.layers / self.curves.dense.layers
