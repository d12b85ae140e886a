"""The number of MLP channels that all layers keep together, from a target."""

from __future__ import annotations

import math
from typing import Literal

from slm_plugin.errors import TargetError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.pruners.width.allocation.projection import Limits
from slm_plugin.pruners.width.budget import kv_counts, wanted_parameters
from slm_plugin.pruners.width.heads import head_parameters, refuse_query_heads
from slm_plugin.pruners.width.hidden_cut import NO_HIDDEN, HiddenCut
from slm_plugin.target import Target


def channel_limits(
    target: Target,
    original: Dimensions,
    current: Dimensions,
    *,
    kv_groups: int | Literal["auto"],
    multiple_of: int,
    floor: float,
    query_heads: int = 0,
    hidden: HiddenCut = NO_HIDDEN,
) -> tuple[Limits, int]:
    """What of the channels a target leaves, if layers may keep different numbers.

    Args:
        target: A ratio or a number of parameters.
        original: Dimensions of the original model.
        current: Dimensions of the model before this stage.
        kv_groups: KV groups to remove from every layer.
        multiple_of: Every layer keeps a multiple of this.
        floor: Smallest share of its channels that a layer keeps, rounded up to a multiple.
        query_heads: Query heads to remove from every KV group, where no whole group goes.
        hidden: Hidden channels to remove.

    Returns:
        The limits of the channels, and the KV groups to remove from every layer.

    Raises:
        TargetError: The target is out of reach; the message names the reachable range.
    """
    refuse_query_heads(query_heads, current)
    wanted = wanted_parameters(target, original, current)
    current, wanted = hidden.narrowed(wanted, target, current)
    widths = current.widths
    if multiple_of > min(widths):
        raise TargetError(
            f"multiple_of {multiple_of} leaves no size to cut the MLP to: a layer has "
            f"{min(widths)} channels",
            hint="choose a smaller multiple_of",
        )
    most = sum(width - width % multiple_of for width in widths)
    floors = tuple(_floor(width, multiple_of, floor) for width in widths)
    counts = kv_counts(kv_groups, wanted, current)
    for groups in counts:
        rest = wanted - current.layers * head_parameters(groups, query_heads, current)
        ideal = sum(widths) - rest / current.channel_parameters
        kept = multiple_of * round(ideal / multiple_of)
        if sum(floors) <= kept <= most and kept < sum(widths):
            return Limits(widths, floors, kept, multiple_of), groups
    heads = f"query_heads {query_heads}" if query_heads else f"kv_groups {counts[-1]}"
    asked = f"the target ({target.describe()}) with {heads}"
    if kept > sum(floors):
        raise TargetError(
            f"{asked} keeps about {ideal:,.0f} of {sum(widths):,} MLP channels; layers that keep "
            f"multiples of {multiple_of} keep at most {min(most, sum(widths) - 1):,}",
            hint="ask for more, or choose a smaller multiple_of",
        )
    raise TargetError(
        f"{asked} keeps about {max(ideal, 0):,.0f} of {sum(widths):,} MLP channels; floor "
        f"{floor:g} and multiple_of {multiple_of} keep at least {sum(floors):,}",
        hint="ask for less, or lower `floor` or multiple_of",
    )


def _floor(width: int, multiple_of: int, share: float) -> int:
    """Fewest channels that a layer keeps; never none, and never more than it can keep."""
    steps = math.ceil(width * share / multiple_of)
    return multiple_of * max(1, min(steps, width // multiple_of))
