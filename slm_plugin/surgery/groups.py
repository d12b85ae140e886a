"""Units of width pruning: the rows and columns of a layer's projections that go together."""

from __future__ import annotations

from collections.abc import Iterable

from slm_plugin.models.view import MLP_PROJECTIONS, Dimensions

Members = dict[str, tuple[int, ...]]
READERS = ("o_proj", "down_proj")


def axis(projection: str) -> int:
    """Axis of a projection's weight that a unit occupies: columns of readers, rows of the rest."""
    return 1 if projection in READERS else 0


def channel_members(channels: Iterable[int]) -> Members:
    """Rows of gate and up and columns of down that belong to some MLP channels."""
    indices = tuple(channels)
    return {name: indices for name in MLP_PROJECTIONS}


def kv_group_members(groups: Iterable[int], dimensions: Dimensions) -> Members:
    """Rows of q, k and v and columns of o that belong to some KV groups.

    Key/value head ``k`` is read by the contiguous block of query heads ``k*g .. k*g + g-1``, as
    ``repeat_kv`` of transformers lays them out. Folding query heads with stride ``kv_heads``, as
    LLM-Pruner does, scores other heads than it removes.
    """
    chosen = tuple(groups)
    keys = _blocks(chosen, dimensions.head_dim)
    queries = _blocks(chosen, dimensions.head_dim * dimensions.queries_per_group)
    return {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}


def _blocks(groups: tuple[int, ...], size: int) -> tuple[int, ...]:
    return tuple(i for group in groups for i in range(group * size, (group + 1) * size))
