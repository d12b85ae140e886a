"""The number of MLP channels and KV groups to remove from every layer."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from slm_plugin.errors import TargetError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.plans import UnitScores
from slm_plugin.pruners.width.hidden_cut import NO_HIDDEN, HiddenCut
from slm_plugin.surgery.portability import splits_evenly
from slm_plugin.target import Target


@dataclass(frozen=True, slots=True)
class Cut:
    """What is removed from every layer.

    Attributes:
        channels: MLP channels; the most that one layer loses, where they differ.
        kv_groups: KV groups.
        by_layer: MLP channels for every layer, where they may differ.
        hidden: Hidden channels of the whole model.
    """

    channels: int
    kv_groups: int
    by_layer: tuple[int, ...] = ()
    hidden: HiddenCut = NO_HIDDEN

    @classmethod
    def keeping(cls, kept: Sequence[int], kv_groups: int, before: Dimensions) -> Cut:
        """The cut that leaves every layer with so many MLP channels."""
        removed = tuple(map(operator.sub, before.widths, kept))
        return cls(max(removed), kv_groups, removed)

    def of_layer(self, layer: int) -> int:
        """MLP channels to remove from one layer."""
        return self.by_layer[layer] if self.by_layer else self.channels

    def removed(self, units: UnitScores) -> int:
        """How many of a layer's units of one kind go."""
        return self.of_layer(units.layer) if units.unit == "mlp_channel" else self.kv_groups

    def after(self, before: Dimensions) -> Dimensions:
        """What the cut leaves of a decoder."""
        widths = [width - self.of_layer(layer) for layer, width in enumerate(before.widths)]
        left = before.with_widths(widths).without_units(kv_groups=self.kv_groups)
        return self.hidden.after(left)


def uniform_cut(
    target: Target,
    original: Dimensions,
    current: Dimensions,
    *,
    kv_groups: int | Literal["auto"],
    multiple_of: int,
    hidden: HiddenCut = NO_HIDDEN,
) -> Cut:
    """The cut nearest to a target.

    Hidden channels and KV groups are removed first and MLP channels make up the rest. The remaining
    channels are a multiple of ``multiple_of``, or all of them. ``auto`` removes the same share of
    KV groups as of the prunable parameters, rounded down to a count that every checkpoint reader
    accepts. It removes more only when the MLP is too small for the rest.

    Args:
        target: A ratio or a number of parameters.
        original: Dimensions of the original model.
        current: Dimensions of the model before this stage.
        kv_groups: KV groups to remove from every layer.
        multiple_of: The remaining intermediate size is a multiple of this.
        hidden: Hidden channels to remove.

    Raises:
        TargetError: The target is out of reach; the hint names the reachable range.
    """
    wanted = wanted_parameters(target, original, current)
    whole = current.parameters
    current, wanted = hidden.narrowed(wanted, target, current)
    if multiple_of >= current.intermediate_size:
        raise TargetError(
            f"multiple_of {multiple_of} leaves no size to cut the MLP to: it has "
            f"{current.intermediate_size} channels",
            hint="choose a smaller multiple_of",
        )
    counts = kv_counts(kv_groups, wanted, current)
    cuts = (_cut(wanted, count, current, multiple_of) for count in counts)
    cut = next((cut for cut in cuts if cut is not None), None)
    reach = _Reach(target, original, current, multiple_of, whole - current.parameters)
    if cut is None:
        raise reach.too_far(wanted, counts[-1])
    if cut == Cut(0, 0) and not hidden.count:
        raise reach.too_little()
    return replace(cut, hidden=hidden)


def wanted_parameters(target: Target, original: Dimensions, current: Dimensions) -> int:
    """Parameters to remove.

    Raises:
        TargetError: There are none.
    """
    wanted = target.parameters_to_remove(original.parameters, current.parameters)
    if wanted <= 0:
        raise TargetError(
            f"the target ({target.describe()}) removes nothing: the model has "
            f"{current.parameters:,} parameters",
            hint="ask for fewer",
        )
    return wanted


def kv_counts(asked: int | Literal["auto"], wanted: int, current: Dimensions) -> tuple[int, ...]:
    """Numbers of KV groups to try, in order of preference.

    Raises:
        TargetError: The model has not so many that can be removed.
    """
    if asked not in ("auto", 0) and not current.kv_group_parameters:
        raise TargetError(
            f"kv_groups {asked}: no KV group of {current.architecture} can be removed alone",
            hint="leave kv_groups out",
        )
    if asked != "auto":
        if asked >= current.kv_heads:
            raise TargetError(
                f"kv_groups {asked} leaves no KV group: every layer has {current.kv_heads}",
                hint=f"at most {current.kv_heads - 1} can be removed",
            )
        return (asked,)
    share = wanted / _prunable(current)
    legal = [
        count
        for count in range(current.kv_heads if current.kv_group_parameters else 1)
        if count == 0 or splits_evenly(current.without_units(kv_groups=count))
    ]
    first = max(count for count in legal if count <= share * current.kv_heads)
    return tuple(count for count in legal if count >= first)


def _prunable(current: Dimensions) -> int:
    channels = sum(current.widths) * current.channel_parameters
    return channels + current.layers * current.kv_heads * current.kv_group_parameters


def _sizes(current: Dimensions, multiple_of: int) -> list[int]:
    """Possible remaining intermediate sizes, largest first."""
    whole = range(multiple_of, current.intermediate_size, multiple_of)
    return [current.intermediate_size, *reversed(whole)]


def _cut(wanted: int, kv_groups: int, current: Dimensions, multiple_of: int) -> Cut | None:
    """The nearest cut with this number of KV groups; None when it is over half a step away."""
    rest = wanted / current.layers - kv_groups * current.kv_group_parameters
    ideal = current.intermediate_size - rest / current.channel_parameters
    sizes = _sizes(current, multiple_of)
    slack = multiple_of / 2
    if not sizes[-1] - slack <= ideal <= sizes[0] + slack:
        return None
    nearest = min(sizes, key=lambda size: abs(size - ideal))
    return Cut(current.intermediate_size - nearest, kv_groups)


@dataclass(frozen=True, slots=True)
class _Reach:
    """Errors for unreachable targets, with the reachable range."""

    target: Target
    original: Dimensions
    current: Dimensions
    multiple_of: int
    taken: int = 0

    def too_far(self, wanted: int, kv_groups: int) -> TargetError:
        """The target is above what the MLP has, or below what the KV groups alone remove."""
        groups = kv_groups * self.current.kv_group_parameters
        if groups * self.current.layers > wanted:
            return TargetError(
                f"kv_groups {kv_groups} alone removes {self._amount(groups)}, more than the "
                f"target ({self.target.describe()})",
                hint="remove fewer KV groups or ask for more",
            )
        channels = self.current.intermediate_size - _sizes(self.current, self.multiple_of)[-1]
        most = groups + channels * self.current.channel_parameters
        return TargetError(
            f"the target ({self.target.describe()}) is out of reach of width pruning",
            hint=f"with {kv_groups} of {self.current.kv_heads} KV groups removed at most "
            f"{self._amount(most)}",
        )

    def too_little(self) -> TargetError:
        """The target is less than half of the smallest step."""
        first, second = _sizes(self.current, self.multiple_of)[:2]
        step = (first - second) * self.current.channel_parameters
        return TargetError(
            f"the target ({self.target.describe()}) is less than half of the smallest step",
            hint=f"one step is {self._amount(step)}: ask for that or more, or choose a smaller "
            "multiple_of",
        )

    def _amount(self, per_layer: int) -> str:
        return amount(self.target, self.original, self.current, per_layer, self.taken)


def amount(
    target: Target, original: Dimensions, current: Dimensions, per_layer: int, taken: int = 0
) -> str:
    """A number of parameters of every layer, as a ratio and as what is left.

    ``current`` is the model without its removed hidden channels, which had ``taken`` parameters.
    """
    whole = per_layer * current.layers
    base = current.parameters + taken if target.of == "current" else original.parameters
    # Rounded down, so that the named ratio is reachable.
    ratio = math.floor((whole + taken) / base * 1000) / 1000
    return f"ratio {ratio:.3f} ({current.parameters - whole:,} parameters left)"
