"""Portability of a pruned model, checked when the plan is made.

What no checkpoint reader can load is an error; what only some readers can load is a warning.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slm_plugin.errors import PlanError, TargetError
from slm_plugin.extras import found_version
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.families import family_of
from slm_plugin.models.view import layer_lists

if TYPE_CHECKING:
    from transformers import PretrainedConfig

KERNEL_MULTIPLES = (8, 64)


def portability(before: Dimensions, after: Dimensions, config: PretrainedConfig) -> tuple[str, ...]:
    """Check the dimensions of a pruned model.

    Args:
        before: Dimensions before pruning.
        after: Dimensions after pruning.
        config: Configuration before pruning.

    Returns:
        Warnings, one sentence each, about readers that cannot load the checkpoint.

    Raises:
        PlanError: No reader can build the model.
        TargetError: The installed transformers cannot load the model.
    """
    refuse_unloadable(before, after)
    refuse_scaled_heads(after, config)
    warnings = (
        split_warning(after),
        head_dim_warning(before, after),
        channels_warning(before, after),
        hidden_warning(before, after),
        widths_warning(after),
        layer_lists_warning(before, after, config),
    )
    return tuple(warning for warning in warnings if warning is not None)


def refuse_unloadable(before: Dimensions, after: Dimensions) -> None:
    """All checks that raise errors; they need only the dimensions.

    Raises:
        PlanError: No reader can build the model.
        TargetError: The installed transformers cannot load the model.
    """
    refuse_empty(after)
    refuse_partial_groups(before, after)
    refuse_untied(before, after)
    refuse_uneven_split(before, after)


def refuse_empty(after: Dimensions) -> None:
    """A decoder keeps at least one layer, channel and KV group, and the experts that one token has.

    Raises:
        PlanError: One of them is removed completely, or too few experts are left to choose from.
    """
    left = {
        "layer": after.layers,
        "MLP channel": min(after.widths, default=0),
        "KV group": after.kv_heads,
        "query head": after.attention_heads,
        "hidden channel": after.hidden_size,
    }
    for unit, count in left.items():
        if count < 1:
            raise PlanError(f"the plan leaves no {unit}", hint="remove less")
    if after.experts < after.experts_per_token:
        raise PlanError(
            f"the plan leaves {after.experts} experts; the router chooses "
            f"{after.experts_per_token} for each token",
            hint="remove less",
        )


def refuse_partial_groups(before: Dimensions, after: Dimensions) -> None:
    """KV groups have equally many query heads, or query heads would read the wrong keys.

    Raises:
        PlanError: The remaining heads are not KV groups of one size, or of more heads than before.
    """
    queries, rest = divmod(after.attention_heads, after.kv_heads)
    if rest or queries > before.queries_per_group:
        raise PlanError(
            f"{after.attention_heads} query heads and {after.kv_heads} key/value heads are not "
            f"whole KV groups of {before.queries_per_group} query heads, or of fewer",
            hint="keep every key/value head, or remove it together with all query heads that "
            "read it",
        )


def refuse_untied(before: Dimensions, after: Dimensions) -> None:
    """Embedding and head that differ are not tied; only a rotation of the stream unties them.

    Raises:
        PlanError: The plan ties them.
    """
    if after.tied_embeddings and not before.tied_embeddings:
        raise PlanError(
            "the plan lets embedding and head share their weights, which differ",
            hint="do not change tied_embeddings",
        )


def splits_evenly(after: Dimensions) -> bool:
    """Whether the head count passes the check that transformers 5 makes for some families.

    The hidden size must be a multiple of it, even if the config has head_dim.
    """
    wanted = family_of(after.architecture, after.stack).even_split
    return not wanted or after.hidden_size % after.attention_heads == 0


def refuse_uneven_split(before: Dimensions, after: Dimensions) -> None:
    """Check that transformers 5 can load the head count again.

    Raises:
        TargetError: transformers 5 is installed and cannot load the head count.
    """
    if splits_evenly(after) or _transformers_major() < 5:
        return
    # Query heads went if they are fewer than those of the KV groups that stay.
    fewer = after.queries_per_group < before.queries_per_group
    unit = "query heads of each KV group" if fewer else "KV groups"
    most = before.queries_per_group if fewer else before.kv_heads
    counts = [str(count) for count in range(most) if splits_evenly(_without(before, count, fewer))]
    narrower = f"keep a multiple of {after.attention_heads} hidden channels"
    heads = f"the {unit} removed may be {', '.join(counts)}"
    raise TargetError(
        f"transformers {found_version('transformers')} refuses to load {after.architecture} with "
        f"{after.attention_heads} heads: the hidden size {after.hidden_size} is no multiple of it",
        hint=heads if before.hidden_size == after.hidden_size else narrower,
    )


def _without(before: Dimensions, count: int, queries: bool) -> Dimensions:
    """The decoder without some query heads of every KV group, or without some KV groups."""
    if queries:
        return before.without_units(query_heads=count * before.kv_heads)
    return before.without_units(kv_groups=count)


def refuse_scaled_heads(after: Dimensions, config: PretrainedConfig) -> None:
    """Check that the class takes the factors of longrope with the remaining heads.

    The config of Phi-3 counts the factors by hidden_size / heads, whatever its head_dim says.

    Raises:
        TargetError: It does not.
    """
    if after.family.rotary != "phi3" or _derived_head_dim(after):
        return
    settings = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None)
    kind = (settings or {}).get("rope_type", (settings or {}).get("type"))
    if kind == "longrope":
        raise TargetError(
            f"{after.architecture} with longrope loads only where hidden_size is heads times "
            f"head_dim, and {after.attention_heads} heads of {after.head_dim} are not "
            f"{after.hidden_size}",
            hint="remove MLP channels alone: leave kv_groups, query_heads and hidden_channels 0",
        )


def split_warning(after: Dimensions) -> str | None:
    """Warn that transformers 5 cannot load an uneven split; 4 can, because of head_dim."""
    if splits_evenly(after):
        return None
    return (
        f"transformers 5 refuses to load {after.architecture} with {after.attention_heads} heads "
        f"at hidden size {after.hidden_size}, which is no multiple of it; transformers 4.57 loads "
        "it"
    )


def head_dim_warning(before: Dimensions, after: Dimensions) -> str | None:
    """Warn about readers that compute head_dim as hidden_size / heads."""
    if not _derived_head_dim(before) or _derived_head_dim(after):
        return None
    return (
        f"head_dim stays {after.head_dim} and is no longer hidden_size / heads "
        f"({after.hidden_size}/{after.attention_heads}): it is written into the config, but "
        "readers that divide instead fail, among them ONNX Runtime through optimum-onnx 0.1 "
        "unless the model is loaded with slm_plugin's reader"
    )


def channels_warning(before: Dimensions, after: Dimensions) -> str | None:
    """Warn about sizes that are slow for kernels or invalid for block formats."""
    lost = _lost_multiples(before.intermediate_size, after.intermediate_size)
    if not lost:
        return None
    slower = _slower("intermediate_size", after.intermediate_size, lost)
    return f"{slower}; multiple_of: {lost[-1]} keeps it a multiple"


def hidden_warning(before: Dimensions, after: Dimensions) -> str | None:
    """The same for the hidden size."""
    lost = _lost_multiples(before.hidden_size, after.hidden_size)
    return _slower("hidden_size", after.hidden_size, lost) if lost else None


def _lost_multiples(had: int, left: int) -> list[int]:
    return [multiple for multiple in KERNEL_MULTIPLES if had % multiple == 0 and left % multiple]


def _slower(size: str, left: int, lost: list[int]) -> str:
    return (
        f"{size} {left} is no longer a multiple of {lost[0]}: some kernels and quantised formats "
        "are slower or reject it"
    )


def widths_warning(after: Dimensions) -> str | None:
    """Warn that a stock class needs padding where layers differ in width."""
    if not after.layer_widths:
        return None
    padded = after.with_widths((after.intermediate_size,) * after.layers)
    zeros = padded.parameters - after.parameters
    return (
        f"layers keep {after.width_range} MLP channels, and no stock class holds different widths: "
        f"a checkpoint pads all layers to {after.intermediate_size:,} with {zeros:,} zeros and has "
        f"{padded.parameters:,} parameters in place of {after.parameters:,}; `onnx` needs no "
        "padding"
    )


def layer_lists_warning(
    before: Dimensions, after: Dimensions, config: PretrainedConfig
) -> str | None:
    """Warn about readers that rebuild per-layer lists from a pattern.

    Lists of equal entries are not affected.
    """
    if before.layers == after.layers:
        return None
    names = [name for name, values in layer_lists(config) if any(v != values[0] for v in values)]
    if not names:
        return None
    return (
        f"{', '.join(names)} of the config holds one entry per layer and is cut with the layers: "
        "readers that rebuild it from a pattern get a different list"
    )


def _derived_head_dim(dimensions: Dimensions) -> bool:
    return dimensions.head_dim * dimensions.attention_heads == dimensions.hidden_size


def _transformers_major() -> int:
    return int((found_version("transformers") or "0").split(".")[0])
