"""Rotary settings of a config: the words of transformers 4 and 5, checked and made one.

transformers 4 writes ``rope_theta`` and ``rope_scaling``, 5 writes ``rope_parameters`` with both.
Each ignores some of the other's words without saying so and computes other positions. So it is with
the length of training: 4 reads ``original_max_position_embeddings`` beside the scaling for longrope
alone, and for longrope nowhere else; 5 reads it in both places for three kinds, the one beside
first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from slm_plugin.models.border import is_transformers_four
from slm_plugin.models.config_values import Field, Where, count, positive, problem

DEFAULT_BASE = 10_000.0
ORIGINAL = "original_max_position_embeddings"
# Kinds for which some release reads the length of training beside the scaling.
ORIGINAL_KINDS = ("yarn", "longrope", "llama3")
# What each kind needs beside its name; what else stands there is optional.
KINDS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", ORIGINAL),
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
    ORIGINAL: count,
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
        The base, and the scaling with its ``rope_type``, or None when there is none. The length of
        training stands in the scaling where it is stated.

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
        name: _scaling(_with_original(found, name, config, where), name, head_dim, where)
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
    scaling = written or before
    if scaling is not None and scaling["rope_type"] == "longrope":
        _check_longrope(scaling, config.get("max_position_embeddings"), where)
    return base, scaling


def rope_fields(base: float, scaling: dict[str, Any] | None) -> dict[str, Any]:
    """The settings in the words of the installed transformers.

    Args:
        base: Base of the frequencies.
        scaling: Scaling with its ``rope_type``, None for none.
    """
    beside: dict[str, Any] = {}
    if scaling is not None and scaling["rope_type"] == "longrope" and ORIGINAL in scaling:
        beside = {ORIGINAL: scaling[ORIGINAL]}
    if is_transformers_four():
        return {**beside, "rope_theta": base, "rope_scaling": scaling}
    parameters = {"rope_type": "default", **(scaling or {}), "rope_theta": base}
    return {**beside, "rope_parameters": parameters}


def _with_original(
    found: dict[str, Any], name: str, config: Mapping[str, Any], where: Where
) -> dict[str, Any]:
    """A scaling with the length of training that the config states beside it."""
    beside, within = config.get(ORIGINAL), found.get(ORIGINAL)
    if beside is not None:
        count(where.at(ORIGINAL), beside)
    if {found.get("rope_type"), found.get("type")}.isdisjoint(ORIGINAL_KINDS):
        return found
    if beside is None:
        longest = config.get("max_position_embeddings")
        if within != longest or "longrope" not in (found.get("rope_type"), found.get("type")):
            return found
        # transformers 5 fills in the longest text when nothing is stated.
        return {key: value for key, value in found.items() if key != ORIGINAL}
    if within is not None and within != beside:
        raise where.contradiction(f"{ORIGINAL} {beside} and {name}.{ORIGINAL} {within}")
    return {**found, ORIGINAL: beside}


def _check_longrope(scaling: dict[str, Any], longest: Any, where: Where) -> None:
    """Refuse what leaves the scale of attention open, or lets two releases work out two."""
    original, factor = scaling.get(ORIGINAL), scaling.get("factor")
    if scaling.get("attention_factor") is not None:
        return
    if original is None and factor is None:
        raise problem(
            where.at("rope_scaling.factor"), None, f"given for rope_type longrope, or {ORIGINAL}"
        )
    if original is None or factor is None:
        return
    if not isinstance(longest, int) or abs(longest / original - factor) > 1e-6 * factor:
        raise where.contradiction(
            f"rope_scaling.factor {factor}, and max_position_embeddings {longest} at "
            f"{ORIGINAL} {original}"
        )


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
