"""The number of MLP channels and heads to remove from every layer."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from slm_plugin.errors import TargetError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.plans import UnitScores
from slm_plugin.pruners.width.heads import HeadUnit, head_parameters, refuse_query_heads
from slm_plugin.pruners.width.hidden_cut import NO_HIDDEN, HiddenCut
from slm_plugin.pruners.width.reach import Reach, sizes
from slm_plugin.surgery.portability import splits_evenly
from slm_plugin.target import Target


@dataclass(frozen=True, slots=True)
class Cut:
    """What is removed from every layer.

    Attributes:
        channels: MLP channels; the most that one layer loses, where they differ.
        kv_groups: KV groups.
        by_layer: MLP channels for every layer, where they may differ.
        query_heads: Query heads of every KV group, where no whole group goes.
        hidden: Hidden channels of the whole model.
    """

    channels: int
    kv_groups: int
    by_layer: tuple[int, ...] = ()
    query_heads: int = 0
    hidden: HiddenCut = NO_HIDDEN

    @classmethod
    def keeping(
        cls, kept: Sequence[int], kv_groups: int, before: Dimensions, query_heads: int = 0
    ) -> Cut:
        """The cut that leaves every layer with so many MLP channels."""
        removed = tuple(map(operator.sub, before.widths, kept))
        return cls(max(removed), kv_groups, removed, query_heads)

    @property
    def heads(self) -> HeadUnit | None:
        """The kind of heads that go; None where none do."""
        if self.query_heads:
            return "query_head"
        return "kv_group" if self.kv_groups else None

    def of_layer(self, layer: int) -> int:
        """MLP channels to remove from one layer."""
        return self.by_layer[layer] if self.by_layer else self.channels

    def removed(self, units: UnitScores) -> int:
        """How many of a layer's units of one kind go; of query heads, from every KV group."""
        if units.unit == "mlp_channel":
            return self.of_layer(units.layer)
        return self.query_heads if units.unit == "query_head" else self.kv_groups

    def after(self, before: Dimensions) -> Dimensions:
        """What the cut leaves of a decoder."""
        widths = [width - self.of_layer(layer) for layer, width in enumerate(before.widths)]
        left = before.with_widths(widths).without_units(
            kv_groups=self.kv_groups, query_heads=self.query_heads * before.kv_heads
        )
        return self.hidden.after(left)


def uniform_cut(
    target: Target,
    original: Dimensions,
    current: Dimensions,
    *,
    kv_groups: int | Literal["auto"],
    multiple_of: int,
    query_heads: int = 0,
    hidden: HiddenCut = NO_HIDDEN,
) -> Cut:
    """The cut nearest to a target.

    Hidden channels and heads are removed first and MLP channels make up the rest. The remaining
    channels are a multiple of ``multiple_of``, or all of them. ``auto`` removes the same share of
    KV groups as of the prunable parameters, rounded down to a count that every checkpoint reader
    accepts. It removes more only when the MLP is too small for the rest.

    Args:
        target: A ratio or a number of parameters.
        original: Dimensions of the original model.
        current: Dimensions of the model before this stage.
        kv_groups: KV groups to remove from every layer.
        multiple_of: The remaining intermediate size is a multiple of this.
        query_heads: Query heads to remove from every KV group, where no whole group goes.
        hidden: Hidden channels to remove.

    Raises:
        TargetError: The target is out of reach; the hint names the reachable range.
    """
    refuse_query_heads(query_heads, current)
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
    cuts = (_cut(wanted, count, query_heads, current, multiple_of) for count in counts)
    cut = next((cut for cut in cuts if cut is not None), None)
    reach = Reach(target, original, current, multiple_of, whole - current.parameters)
    if cut is None:
        raise reach.too_far(wanted, counts[-1], query_heads)
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


def _cut(
    wanted: int, kv_groups: int, query_heads: int, current: Dimensions, multiple_of: int
) -> Cut | None:
    """The nearest cut with these numbers of heads; None when it is over half a step away."""
    rest = wanted / current.layers - head_parameters(kv_groups, query_heads, current)
    ideal = current.intermediate_size - rest / current.channel_parameters
    possible = sizes(current, multiple_of)
    slack = multiple_of / 2
    if not possible[-1] - slack <= ideal <= possible[0] + slack:
        return None
    nearest = min(possible, key=lambda size: abs(size - ideal))
    return Cut(current.intermediate_size - nearest, kv_groups, query_heads=query_heads)
