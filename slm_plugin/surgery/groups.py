"""Units of width pruning: coupled rows and columns of a layer's projections."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.view import MLP_PROJECTIONS

Members = dict[str, tuple[int, ...]]
READERS = ("o_proj", "down_proj")


def axis(projection: str) -> int:
    """Axis of a unit in a projection's weight: columns of o and down, rows of the others."""
    return 1 if projection in READERS else 0


def members(unit: str, indices: Iterable[int], dimensions: Dimensions) -> Members:
    """Rows and columns of some units of one layer, by projection.

    Args:
        unit: What is meant, by its name in `Dimensions.units`.
        indices: The units.
        dimensions: Sizes of the decoder.
    """
    if unit == "channels":
        found = channel_members(indices)
    elif unit == "query_heads":
        found = query_head_members(indices, dimensions)
    else:
        found = kv_group_members(indices, dimensions)
    return {
        name: tuple(itertools.chain(*pieces(found, name, dimensions)))
        for name in dimensions.family.projections
        if dimensions.family.parts(name)[0] in found
    }


def pieces(found: Members, projection: str, dimensions: Dimensions) -> list[tuple[int, ...]]:
    """Rows or columns of units in one matrix, for each of the projections in it.

    Args:
        found: Rows and columns of the units, as if every projection were a matrix.
        projection: Short name of the matrix.
        dimensions: Sizes of the decoder.
    """
    sizes = {
        "q_proj": dimensions.attention_heads * dimensions.head_dim,
        "k_proj": dimensions.kv_heads * dimensions.head_dim,
        "v_proj": dimensions.kv_heads * dimensions.head_dim,
        "gate_proj": dimensions.intermediate_size,
        "up_proj": dimensions.intermediate_size,
    }
    placed, start = [], 0
    for part in dimensions.family.parts(projection):
        placed.append(tuple(start + index for index in found[part]))
        start += sizes.get(part, 0)
    return placed


def channel_members(channels: Iterable[int]) -> Members:
    """Rows of gate and up and columns of down of some MLP channels."""
    indices = tuple(channels)
    return {name: indices for name in MLP_PROJECTIONS}


def kv_group_members(groups: Iterable[int], dimensions: Dimensions) -> Members:
    """Rows of q, k and v and columns of o of some KV groups.

    The contiguous query heads ``k*g .. k*g + g-1`` read key/value head ``k``, as in ``repeat_kv``
    of transformers. Folding query heads with stride ``kv_heads``, as
    LLM-Pruner does, scores different heads than it removes.
    """
    chosen = tuple(groups)
    keys = _blocks(chosen, dimensions.head_dim)
    queries = _blocks(chosen, dimensions.head_dim * dimensions.queries_per_group)
    return {"q_proj": queries, "k_proj": keys, "v_proj": keys, "o_proj": queries}


def query_head_members(heads: Iterable[int], dimensions: Dimensions) -> Members:
    """Rows of q and columns of o of some query heads.

    The key/value heads stay, so k and v, which may share a matrix with q, lose nothing.
    """
    queries = _blocks(tuple(heads), dimensions.head_dim)
    return {"q_proj": queries, "k_proj": (), "v_proj": (), "o_proj": queries}


def _blocks(groups: tuple[int, ...], size: int) -> tuple[int, ...]:
    return tuple(i for group in groups for i in range(group * size, (group + 1) * size))
