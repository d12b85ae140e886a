"""Heads as units: which kinds there are, how many may go, and from which parts of a layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from slm_plugin.counts import Natural
from slm_plugin.errors import TargetError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.plans import UnitScores

if TYPE_CHECKING:
    from slm_plugin.models.families.family import Family

HeadUnit = Literal["kv_group", "query_head"]
QueryHeads = Annotated[
    Annotated[Natural, Field(strict=True)],
    Field(
        description="query heads to remove from every KV group of every layer; the key/value "
        "heads, and with them the cache, stay"
    ),
]


def refuse_query_heads(asked: int, current: Dimensions) -> None:
    """Check that every KV group has so many query heads to spare.

    Args:
        asked: Query heads to remove from every KV group.
        current: Dimensions of the model before this stage.

    Raises:
        TargetError: They have not.
    """
    if not asked:
        return
    if not current.query_head_parameters:
        raise TargetError(
            f"query_heads {asked}: no query head of {current.architecture} can be removed alone",
            hint="leave query_heads out",
        )
    lacking = too_many_query_heads(asked, current.queries_per_group)
    if lacking:
        raise TargetError(lacking[0], hint=lacking[1])


def too_many_query_heads(asked: int, queries: int) -> tuple[str, str] | None:
    """What is wrong, and the remedy, if so many query heads go; None where nothing is.

    Args:
        asked: Query heads to remove from every KV group.
        queries: Query heads of a KV group.
    """
    if asked < queries:
        return None
    if queries == 1:
        return (
            f"query_heads {asked} leaves none: every key/value head has one query head",
            "leave query_heads out; kv_groups removes both together",
        )
    return (
        f"query_heads {asked} leaves none: every KV group has {queries} query heads",
        f"at most {queries - 1} can be removed",
    )


def unsuited_query_heads(asked: int, family: Family, config: Mapping[str, Any]) -> str:
    """Why so many query heads cannot go, as half a sentence; empty where they can.

    Args:
        asked: Query heads to remove from every KV group.
        family: What is true of the model's class.
        config: Content of its ``config.json``; what it does not state is not judged.
    """
    if asked and "kv_groups" not in family.units:
        return f"{family.reason('kv_groups')}; leave query_heads out"
    text = config.get("text_config")
    sizes = family.canonical(text if isinstance(text, Mapping) else config)
    heads = sizes.get("num_attention_heads")
    groups = sizes.get("num_key_value_heads") or heads
    # Values of a file that nobody has checked yet.
    if not asked or type(heads) is not int or type(groups) is not int or groups < 1:
        return ""
    return "; ".join(too_many_query_heads(asked, heads // groups) or ())


def head_parameters(kv_groups: int, query_heads: int, current: Dimensions) -> int:
    """Scalars of a layer's KV groups, and of some query heads of every KV group."""
    every = query_heads * current.kv_heads
    return kv_groups * current.kv_group_parameters + every * current.query_head_parameters


def counted_units(unit: HeadUnit, dimensions: Dimensions) -> tuple[str, int, int]:
    """A kind of heads: its name in `Dimensions.units`, how many there are, columns of one."""
    if unit == "query_head":
        return "query_heads", dimensions.attention_heads, dimensions.head_dim
    columns = dimensions.queries_per_group * dimensions.head_dim
    return "kv_groups", dimensions.kv_heads, columns


def sections(units: UnitScores, kv_heads: int) -> list[tuple[float, ...]]:
    """The scores of a layer's units, in parts each of which loses the same number.

    Query heads are parted by the key/value head that they read; all other units are one part.

    Args:
        units: The scores.
        kv_heads: Key/value heads of the layer.
    """
    count = kv_heads if units.unit == "query_head" else 1
    size = len(units.scores) // count
    return [units.scores[part * size : (part + 1) * size] for part in range(count)]


def joined_sections(parts: Iterable[tuple[int, ...]], size: int) -> tuple[int, ...]:
    """Indices within parts of one size as indices of the whole."""
    return tuple(part * size + index for part, kept in enumerate(parts) for index in kept)
