"""Rotary settings of a config: the words of transformers 4 and 5, checked and made one.

transformers 4 writes ``rope_theta`` and ``rope_scaling``, 5 writes ``rope_parameters`` with both.
Each ignores some of the other's words without saying so and computes other positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slm_plugin.models.config_values import Field, Where, count, positive, problem

DEFAULT_BASE = 10_000.0
# What each kind needs beside its name; what else stands there is optional.
KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
}
VALUES: dict[str, Field] = {
    "factor": positive,
    "attention_factor": positive,
    "beta_fast": positive,
    "beta_slow": positive,
    "low_freq_factor": positive,
    "high_freq_factor": positive,
    "mscale": positive,
    "mscale_all_dim": positive,
    "original_max_position_embeddings": count,
}


def rope_settings(
    config: Mapping[str, Any], head_dim: int, where: Where
) -> tuple[float, dict[str, Any] | None]:
    """Base and scaling that a config states in either way.

    Args:
        config: Content of ``config.json``.
        head_dim: Length of a head.
        where: Names the config in messages.

    Returns:
        The base, and the scaling with its ``rope_type``, or None when there is none.

    Raises:
        ModelSourceError: The settings are malformed, contradict each other, or are unknown.
    """
    parameters = _dict(config, "rope_parameters", where)
    legacy = _dict(config, "rope_scaling", where)
    # transformers 5 also takes `rope_theta` inside of `rope_scaling`.
    stated = {
        place: value
        for place, value in (
            ("rope_theta", config.get("rope_theta")),
            ("rope_parameters.rope_theta", parameters.get("rope_theta")),
            ("rope_scaling.rope_theta", legacy.get("rope_theta")),
        )
        if value is not None
    }
    for place, value in stated.items():
        positive(where.at(place), value)
    if len({float(value) for value in stated.values()}) > 1:
        raise where.contradiction(" and ".join(f"{p} {v}" for p, v in stated.items()))
    scalings = {
        name: _scaling(found, name, head_dim, where)
        for name, found in (("rope_parameters", parameters), ("rope_scaling", legacy))
    }
    written, before = scalings["rope_parameters"], scalings["rope_scaling"]
    if parameters and legacy and written != before:
        raise where.contradiction("rope_parameters and another rope_scaling")
    for place, value in (
        ("partial_rotary_factor", config.get("partial_rotary_factor")),
        ("rope_parameters.partial_rotary_factor", parameters.get("partial_rotary_factor")),
        ("rope_scaling.partial_rotary_factor", legacy.get("partial_rotary_factor")),
    ):
        if value is not None and value != 1:
            raise problem(where.at(place), value, "1: positions that turn a part of a head")
    base = float(next(iter(stated.values()), DEFAULT_BASE))
    return base, written or before


def _dict(config: Mapping[str, Any], name: str, where: Where) -> dict[str, Any]:
    found = config.get(name)
    if found is None:
        return {}
    if not isinstance(found, dict):
        raise problem(where.at(name), found, "an object or null")
    return found


def _scaling(
    found: dict[str, Any], name: str, head_dim: int, where: Where
) -> dict[str, Any] | None:
    """One of the two objects as a scaling, None when it states none."""
    if not found:
        return None
    kinds = [found[key] for key in ("rope_type", "type") if found.get(key) is not None]
    stray = [key for key in found if key not in ("rope_theta", "partial_rotary_factor")]
    if not kinds and stray:
        raise problem(where.at(f"{name}.rope_type"), None, f"given, as {name} has {stray[0]}")
    nested = next((key for key, value in found.items() if isinstance(value, dict)), None)
    if nested is not None:
        raise problem(where.at(f"{name}.{nested}"), "an object", "one value for all layers")
    kind = kinds[0] if kinds else "default"
    if any(other != kind for other in kinds):
        raise where.contradiction(f"{name}.rope_type {kinds[0]} and {name}.type {kinds[1]}")
    if not isinstance(kind, str) or kind not in KINDS:
        raise problem(where.at(f"{name}.rope_type"), kind, f"one of {', '.join(KINDS)}")
    if kind == "default":
        return None
    for key in KINDS[kind]:
        if found.get(key) is None:
            raise problem(where.at(f"{name}.{key}"), None, f"given for rope_type {kind}")
    for key, value in found.items():
        if key in VALUES and value is not None:
            VALUES[key](where.at(f"{name}.{key}"), value)
        if key in ("short_factor", "long_factor"):
            _factors(where.at(f"{name}.{key}"), value, head_dim // 2)
    if kind == "llama3" and not found["low_freq_factor"] < found["high_freq_factor"]:
        raise problem(
            where.at(f"{name}.low_freq_factor"),
            found["low_freq_factor"],
            f"below high_freq_factor, {found['high_freq_factor']}",
        )
    dropped = ("rope_theta", "type", "partial_rotary_factor")
    kept = {key: value for key, value in found.items() if key not in dropped}
    return {**kept, "rope_type": kind}


def _factors(place: str, value: Any, length: int) -> None:
    if not isinstance(value, list) or len(value) != length:
        raise problem(place, value, f"a list of {length} numbers, half of a head")
    for index, factor in enumerate(value):
        positive(f"{place}[{index}]", factor)
