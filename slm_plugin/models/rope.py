"""Rotary settings of a config: the words of transformers 4 and 5, checked and made one.

transformers 4 writes ``rope_theta`` and ``rope_scaling``, 5 writes ``rope_parameters`` with both.
Each ignores some of the other's words without saying so and computes other positions. So it is with
the length of training: 4 reads ``original_max_position_embeddings`` beside the scaling for longrope
alone, and for longrope nowhere else; 5 reads it in both places for three kinds, the one beside
first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from slm_plugin.models.border import is_transformers_four
from slm_plugin.models.config_values import Field, Where, count, positive, problem
from slm_plugin.models.families.family import FULL, SLIDING, Family

PART, NEOX_BASE = "rotary_pct", "rotary_emb_base"
LOCAL, LOCAL_BASE = "rope_local_base_freq", 10_000.0
SECTION, INTERLEAVED = "mrope_section", "mrope_interleaved"
DEFAULT_SECTION = [24, 20, 20]
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


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary settings of a model.

    Attributes:
        base: Base of the frequencies.
        scaling: Scaling with its ``rope_type``, None for none. The length of training stands in it
            where it is stated.
        part: Part of a head that is turned.
        local_base: Base for layers with sliding attention, where they have a table of their own.
        sections: How pairs of channels are shared out among three positions, where a token has
            three.
    """

    base: float
    scaling: dict[str, Any] | None
    part: float = 1.0
    local_base: float | None = None
    sections: Mapping[str, Any] = field(default_factory=dict)


def rope_settings(config: Mapping[str, Any], head_dim: int, family: Family, where: Where) -> Rope:
    """Rotary settings that a config states in either way.

    Args:
        config: Content of ``config.json``.
        head_dim: Length of a head.
        family: What is true of the model's class.
        where: Names the config in messages.

    Raises:
        ModelSourceError: The settings are malformed, contradict each other, or are unknown.
    """
    local = None
    if family.rotary == "by_kind":
        config, local = _by_kind(config, where)
    if family.rotary == "neox":
        config = _neox(config)
    sections: dict[str, Any] = {}
    if family.rotary == "mrope":
        config, sections = _by_position(config, head_dim, where)
    parameters = _dict(config, "rope_parameters", where)
    legacy = _dict(config, "rope_scaling", where)
    base = _stated(config, parameters, legacy, "rope_theta", where)
    part = _stated(config, parameters, legacy, "partial_rotary_factor", where)
    if base is None:
        base = family.default_rope_base
    if base is None:
        raise problem(where.at("rope_theta"), None, f"given for a {family.model_type}")
    if family.partial_rotary is None:
        if part not in (None, 1):
            raise problem(where.at("partial_rotary_factor"), part, "1: the whole head is turned")
    elif part is not None and not part <= 1:
        raise problem(where.at("partial_rotary_factor"), part, "a number above 0, at most 1")
    part = part or family.partial_rotary or 1.0
    turned = int(head_dim * part)
    scalings = {
        name: _scaling(_with_original(found, name, config, where), name, turned, where)
        for name, found in (("rope_parameters", parameters), ("rope_scaling", legacy))
    }
    written, before = scalings["rope_parameters"], scalings["rope_scaling"]
    if parameters and legacy and written != before:
        raise where.contradiction("rope_parameters and another rope_scaling")
    scaling = written or before
    if scaling is not None and scaling["rope_type"] == "longrope":
        _check_longrope(scaling, config.get("max_position_embeddings"), where)
    if family.rotary == "by_kind":
        local = local or (LOCAL_BASE if LOCAL in family.fields else base)
        if LOCAL not in family.fields and local != base and is_transformers_four():
            raise where.contradiction(f"rope_theta {base}, and {local} for sliding_attention")
    return Rope(base, scaling, part, local, sections)


def rope_fields(rope: Rope, family: Family) -> dict[str, Any]:
    """The settings in the words of the installed transformers."""
    base, scaling = rope.base, rope.scaling
    beside: dict[str, Any] = {}
    if family.rotary == "none":
        return beside
    if scaling is not None and scaling["rope_type"] == "longrope" and ORIGINAL in scaling:
        beside = {ORIGINAL: scaling[ORIGINAL]}
    if family.partial_rotary is not None:
        beside["partial_rotary_factor"] = rope.part
    if is_transformers_four():
        if LOCAL in family.fields:
            beside[LOCAL] = rope.local_base
        if family.rotary == "neox":
            return {PART: rope.part, NEOX_BASE: base, "rope_scaling": scaling}
        if family.rotary == "phi3" and scaling is not None:
            # Its class wants these three and no other.
            factors = {name: scaling[name] for name in ("short_factor", "long_factor")}
            scaling = {**factors, "type": scaling["rope_type"]}
        if rope.sections:
            scaling = {"rope_type": "default", **(scaling or {}), **rope.sections}
        return {**beside, "rope_theta": base, "rope_scaling": scaling}
    parameters = {
        "rope_type": "default",
        **(scaling or {}),
        **rope.sections,
        "rope_theta": base,
    }
    if family.partial_rotary is not None:
        parameters["partial_rotary_factor"] = beside.pop("partial_rotary_factor")
    if family.rotary == "by_kind":
        sliding = {"rope_type": "default", "rope_theta": rope.local_base}
        parameters = {FULL: parameters, SLIDING: sliding}
    return {**beside, "rope_parameters": parameters}


def _neox(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings of a GPT-NeoX in the words of other classes."""
    words = {"rope_theta": NEOX_BASE, "partial_rotary_factor": PART}
    said = {other: config[own] for other, own in words.items() if config.get(own) is not None}
    return {**config, **said}


def _by_kind(config: Mapping[str, Any], where: Where) -> tuple[Mapping[str, Any], float | None]:
    """The config with the settings of full attention alone, and the base for sliding attention."""
    found = dict(config)
    bases: dict[str, float] = {}
    if config.get(LOCAL) is not None:
        bases[LOCAL] = config[LOCAL]
    parameters = _dict(config, "rope_parameters", where)
    if parameters:
        for kind in (FULL, SLIDING):
            if not isinstance(parameters.get(kind), dict):
                place = where.at(f"rope_parameters.{kind}")
                raise problem(place, parameters.get(kind), "an object: one per attention type")
        place = f"rope_parameters.{SLIDING}"
        sliding = parameters[SLIDING]
        if sliding.get("rope_type", "default") != "default":
            raise problem(where.at(f"{place}.rope_type"), sliding["rope_type"], "default")
        if sliding.get("rope_theta") is not None:
            bases[f"{place}.rope_theta"] = sliding["rope_theta"]
        found["rope_parameters"] = parameters[FULL]
    return found, _one_number(bases, where)


def _by_position(
    config: Mapping[str, Any], head_dim: int, where: Where
) -> tuple[Mapping[str, Any], dict[str, Any]]:
    """The config without what belongs to three positions, and that."""
    found = dict(config)
    stated: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        settings = _dict(config, name, where)
        found[name] = {k: v for k, v in settings.items() if k not in (SECTION, INTERLEAVED)}
        if settings.get(INTERLEAVED, True) is not True:
            place = where.at(f"{name}.{INTERLEAVED}")
            raise problem(place, settings[INTERLEAVED], "true: the class knows no other order")
        if settings.get(SECTION) is not None:
            stated[f"{name}.{SECTION}"] = settings[SECTION]
    if not stated:
        stated["rope_scaling." + SECTION] = DEFAULT_SECTION
    for place, section in stated.items():
        if not isinstance(section, list) or len(section) != 3:
            raise problem(where.at(place), section, "a list of 3 numbers, one per position")
        for one in section:
            count(where.at(place), one)
        if sum(section) != head_dim // 2:
            raise problem(where.at(place), section, f"{head_dim // 2} pairs of channels in all")
    if len({tuple(section) for section in stated.values()}) > 1:
        raise where.contradiction(f"rope_parameters and another {SECTION} in rope_scaling")
    return found, {SECTION: next(iter(stated.values())), INTERLEAVED: True}


def _stated(
    config: Mapping[str, Any],
    parameters: Mapping[str, Any],
    legacy: Mapping[str, Any],
    name: str,
    where: Where,
) -> float | None:
    """A number that stands beside the settings or in either form of them; all must agree."""
    stated = {
        place: found[name]
        for place, found in (
            (name, config),
            (f"rope_parameters.{name}", parameters),
            # transformers 5 also takes it inside of `rope_scaling`.
            (f"rope_scaling.{name}", legacy),
        )
        if found.get(name) is not None
    }
    return _one_number(stated, where)


def _one_number(stated: Mapping[str, Any], where: Where) -> float | None:
    """The number that all places state; None where there are none."""
    for place, value in stated.items():
        positive(where.at(place), value)
    where.check_agreement(stated)
    return next((float(value) for value in stated.values()), None)


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


def _scaling(found: dict[str, Any], name: str, turned: int, where: Where) -> dict[str, Any] | None:
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
            _factors(where.at(f"{name}.{key}"), value, turned // 2)
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
        raise problem(place, value, f"a list of {length} numbers, half of what is turned")
    for index, factor in enumerate(value):
        positive(f"{place}[{index}]", factor)
