"""Shapes of a decoder, and which of them tell the terms of a time model apart."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from slm_plugin.errors import TargetError, UnsupportedModelError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.surgery.portability import refuse_unloadable, splits_evenly

# Shares of the layers and of the MLP channels that the smallest measured shape has.
_DEPTH, _WIDTH = 2 / 3, 0.6
# MLP channels are measured in multiples of this, as width strategies round by default.
_CHANNELS_AT_A_TIME = 8


@dataclass(frozen=True, slots=True, order=True)
class Shape:
    """What all layers of a pruned decoder have in common, and how many there are.

    Attributes:
        layers: Decoder layers.
        mlp_width: MLP channels of each; in a mixture of experts those of one expert.
        kv_groups: Key/value heads of each, with all query heads that read them.
    """

    layers: int
    mlp_width: int
    kv_groups: int

    @classmethod
    def of(cls, sizes: Dimensions) -> Shape:
        """The shape of a decoder.

        Raises:
            UnsupportedModelError: Layers differ in width, or it is an encoder or a part of one.
        """
        if sizes.layer_widths:
            raise UnsupportedModelError(
                f"the layers have {sizes.width_range} MLP channels, and a shape has layers "
                "of one width"
            )
        if sizes.family.by_tensors:
            raise UnsupportedModelError(
                f"{sizes.family.label} has no prefill and no decoding to time"
            )
        return cls(sizes.layers, sizes.intermediate_size, sizes.kv_heads)

    @property
    def channels(self) -> int:
        """MLP channels of all layers together."""
        return self.layers * self.mlp_width

    @property
    def said(self) -> str:
        """The shape in words."""
        return f"{self.layers} layers with {self.mlp_width:,} MLP channels"

    def of_model(self, dense: Dimensions) -> Dimensions:
        """The dimensions of a decoder pruned to this shape.

        Raises:
            UnsupportedModelError: Units go that cannot be removed from the family.
            TargetError: The model has fewer units, none would be left, or the installed
                transformers cannot load it.
        """
        most, least = Shape.of(dense), Shape(max(1, dense.fixed_layers), 1, 1)
        for name in ("layers", "mlp_width", "kv_groups"):
            count, low, high = (getattr(one, name) for one in (self, least, most))
            if not low <= count <= high:
                raise TargetError(f"{name} is {count}, and can be {low} to {high}")
        fewer = {
            "channels": dense.intermediate_size - self.mlp_width,
            "kv_groups": dense.kv_heads - self.kv_groups,
        }
        for unit, count in fewer.items():
            if count and unit not in dense.units:
                raise UnsupportedModelError(
                    f"{unit} cannot be removed from {dense.architecture}: "
                    f"{dense.family.reason(unit)}"
                )
        after = dense.without_layers(dense.layers - self.layers).without_units(**fewer)
        refuse_unloadable(dense, after)
        return after


@dataclass(frozen=True, slots=True, order=True)
class MixedShape:
    """A pruned decoder whose layers may keep different numbers of MLP channels.

    Attributes:
        widths: MLP channels of every layer of the model; 0 for a removed one.
        kv_groups: Key/value heads of each.
    """

    widths: tuple[int, ...]
    kv_groups: int

    @property
    def left(self) -> tuple[int, ...]:
        """MLP channels of the layers that are left."""
        return tuple(width for width in self.widths if width)

    @property
    def layers(self) -> int:
        """Decoder layers."""
        return len(self.left)

    @property
    def mlp_width(self) -> int:
        """MLP channels of the widest layer."""
        return max(self.widths)

    @property
    def channels(self) -> int:
        """MLP channels of all layers together."""
        return sum(self.widths)

    @property
    def said(self) -> str:
        """The shape in words."""
        least = f"{min(self.left):,} to " if len({*self.left}) > 1 else ""
        return f"{self.layers} layers with {least}{self.mlp_width:,} MLP channels"

    def of_model(self, dense: Dimensions) -> Dimensions:
        """The dimensions of a decoder pruned to this shape.

        Raises:
            PlanError: No layer is left.
        """
        after = dense.without_layers(dense.layers - self.layers).with_widths(self.left)
        refuse_unloadable(dense, after)
        return after


AnyShape: TypeAlias = "Shape | MixedShape"


def shapes_to_measure(dense: Dimensions, *, kv_groups: bool = False) -> list[Shape]:
    """At most eight shapes that tell the terms of a time model apart, the dense one first.

    The corners of layers, MLP channels and, on request, KV groups, and two shapes in the middle.

    Args:
        dense: The model as it is.
        kv_groups: KV groups may be removed as well.

    Raises:
        UnsupportedModelError: As `Shape.of`.
    """
    whole = Shape.of(dense)
    low, middle = (_fewer_layers(dense, share) for share in (_DEPTH, (1 + _DEPTH) / 2))
    narrow, half = (_narrower(dense, share) for share in (_WIDTH, (1 + _WIDTH) / 2))
    groups = _fewer_groups(dense) if kv_groups else whole.kv_groups
    candidates = [
        (whole.layers, whole.mlp_width, whole.kv_groups),
        (low, narrow, whole.kv_groups),
        (whole.layers, narrow, whole.kv_groups),
        (low, whole.mlp_width, whole.kv_groups),
        (whole.layers, whole.mlp_width, groups),
        (low, narrow, groups),
        (middle, half, whole.kv_groups),
        (middle, half, groups),
    ]
    return list(dict.fromkeys(Shape(*one) for one in candidates))


def _fewer_layers(dense: Dimensions, share: float) -> int:
    return min(dense.layers, max(1, dense.fixed_layers + 1, round(share * dense.layers)))


def _narrower(dense: Dimensions, share: float) -> int:
    """A share of the MLP channels, in whole multiples where there are several."""
    width = dense.intermediate_size
    if "channels" not in dense.units:
        return width
    wanted = math.ceil(share * width / _CHANNELS_AT_A_TIME) * _CHANNELS_AT_A_TIME
    return min(width, wanted)


def _fewer_groups(dense: Dimensions) -> int:
    """About half of the KV groups, as many as can be loaded; all of them where none can go."""
    if "kv_groups" not in dense.units:
        return dense.kv_heads
    left = {
        count: dense.without_units(kv_groups=dense.kv_heads - count)
        for count in range(1, dense.kv_heads)
    }
    fitting = [count for count, after in left.items() if splits_evenly(after)]
    return min(fitting or [dense.kv_heads], key=lambda count: abs(2 * count - dense.kv_heads))
