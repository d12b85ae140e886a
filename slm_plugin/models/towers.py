"""The config of a model of images and text: an object for the text, one for the vision model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from slm_plugin.errors import UnsupportedModelError
from slm_plugin.models.border import is_transformers_four
from slm_plugin.models.config_values import Where, count, problem, truth, whole
from slm_plugin.models.families.family import Family, Tower

TEXT, VISION = "text_config", "vision_config"
TIED = "tie_word_embeddings"
# Sizes of vision models, by the names that any of them has.
SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "depth",
    "num_attention_heads",
    "num_heads",
    "num_channels",
    "in_channels",
    "image_size",
    "patch_size",
    "spatial_merge_size",
    "temporal_patch_size",
    "out_hidden_size",
    "num_position_embeddings",
)
DEPTHS = ("num_hidden_layers", "depth")
BASE = 10_000
TOWER, LEVEL = "model.vision_tower.", "vision_model."
# Where the layers of vision models are, by the names in memory.
VISION_LAYERS = (
    f"{TOWER}encoder.layers.",
    f"{TOWER}{LEVEL}encoder.layers.",
    "model.visual.blocks.",
)
_Tensor = TypeVar("_Tensor")


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a ``config.json``.

    Attributes:
        outer: What stands beside the two objects.
        text: What describes the decoder, with the defaults of its class.
        vision: What describes the vision model.
    """

    outer: dict[str, Any]
    text: dict[str, Any]
    vision: dict[str, Any]


def split(content: Mapping[str, Any], family: Family, tower: Tower, where: Where) -> Parts:
    """Take a config apart and check what belongs to no decoder.

    Whether the head is the embedding is afterwards stated both beside and inside of
    ``text_config``: transformers 4.57 reads the one, 5 the other.

    Raises:
        ModelSourceError: A part is missing or malformed, or the parts contradict each other.
        UnsupportedModelError: A part is of another kind than the family's.
    """
    given, vision = (_part(content, name, family, where) for name in (TEXT, VISION))
    _check_kind(given, (tower.text,), family, where.inside(TEXT))
    _check_kind(vision, tower.vision, family, where.inside(VISION))
    text = {**tower.defaults, **given}
    outer = {name: value for name, value in content.items() if name not in (TEXT, VISION)}
    for name, check in tower.fields.items():
        if name in outer:
            check(where.at(name), outer[name])
    _check_vision(vision, where.inside(VISION))
    _check_joints(text, vision, tower, where)
    stated = {
        place.at(TIED): part[TIED]
        for place, part in ((where, outer), (where.inside(TEXT), text))
        if part.get(TIED) is not None
    }
    for place, value in stated.items():
        truth(place, value)
    where.check_agreement(stated)
    tied = next(iter(stated.values()), tower.tied)
    return Parts({**outer, TIED: tied}, {**text, TIED: tied}, vision)


def in_memory_names(stored: Mapping[str, _Tensor], family: Family) -> dict[str, _Tensor]:
    """Tensors of a checkpoint by the names that the installed transformers has in memory.

    Checkpoints have the names of the first release, which transformers still writes, or its own.
    """
    tower = family.tower
    return {
        name if tower is None else _in_memory(name, tower): value for name, value in stored.items()
    }


def portable_names(weights: Mapping[str, _Tensor], family: Family) -> dict[str, _Tensor] | None:
    """Weights by names that both releases read; None where those in memory are such.

    transformers 5 has the vision model one module less deep, and writes a new one so.
    """
    tower = family.tower
    if tower is None or not tower.nested_vision or is_transformers_four():
        return None
    return {_deeper(name): value for name, value in weights.items()}


def common_name(name: str) -> str:
    """The name in memory of a weight of a vision model, without what releases differ in."""
    inner = name.removeprefix(TOWER)
    return name if inner == name else TOWER + inner.removeprefix(LEVEL)


def written_names(weights: Mapping[str, _Tensor], family: Family) -> dict[str, _Tensor]:
    """Weights by the names that `save_pretrained` writes, which both releases read."""
    named = portable_names(weights, family) or weights
    tower = family.tower
    return dict(named) if tower is None else {_outside(n, tower): w for n, w in named.items()}


def _outside(name: str, tower: Tower) -> str:
    for begin, instead in tower.stored:
        if name.startswith(instead):
            return begin + name.removeprefix(instead)
    return name


def _in_memory(name: str, tower: Tower) -> str:
    for begin, instead in tower.stored:
        if name.startswith(begin):
            name = instead + name.removeprefix(begin)
            break
    if not tower.nested_vision or not name.startswith(TOWER):
        return name
    return _deeper(name) if is_transformers_four() else common_name(name)


def _deeper(name: str) -> str:
    inner = name.removeprefix(TOWER)
    return name if inner == name or inner.startswith(LEVEL) else f"{TOWER}{LEVEL}{inner}"


def vision_layers(vision: Any) -> int:
    """Layers of a vision model by its config."""
    return int(next(getattr(vision, name) for name in DEPTHS if hasattr(vision, name)))


def _part(content: Mapping[str, Any], name: str, family: Family, where: Where) -> dict[str, Any]:
    found = content.get(name)
    if not isinstance(found, dict):
        raise problem(where.at(name), found, f"an object: a {family.model_type} has one")
    return dict(found)


def _check_kind(
    part: Mapping[str, Any], known: tuple[str, ...], family: Family, where: Where
) -> None:
    kind = part.get("model_type", known[0])
    if kind not in known:
        raise UnsupportedModelError(
            f"{where.at('model_type')} is {kind}, which is not supported in a {family.model_type}",
            hint=f"supported: {', '.join(known)}",
        )


def _check_vision(vision: Mapping[str, Any], where: Where) -> None:
    for name in SIZES:
        if name in vision:
            count(where.at(name), vision[name])
    rope = vision.get("rope_parameters")
    # transformers 4.57 has no other base.
    if isinstance(rope, dict) and rope.get("rope_theta", BASE) != BASE:
        raise problem(where.at("rope_parameters.rope_theta"), rope["rope_theta"], str(BASE))


def _check_joints(
    text: Mapping[str, Any], vision: Mapping[str, Any], tower: Tower, where: Where
) -> None:
    """Check what one part states about the other."""
    put_out, hidden = vision.get("out_hidden_size"), text.get("hidden_size")
    if put_out is not None and put_out != hidden:
        raise where.contradiction(
            f"{VISION}.out_hidden_size {put_out} and {TEXT}.hidden_size {hidden}"
        )
    if not tower.deepstack:
        return
    place = where.inside(VISION).at(tower.deepstack)
    listed, layers = vision.get(tower.deepstack), text.get("num_hidden_layers")
    if not isinstance(listed, list):
        raise problem(place, listed, "a list of layers of the vision model")
    for one in listed:
        whole(place, one)
    if isinstance(layers, int) and len(listed) > layers:
        raise where.contradiction(
            f"{VISION}.{tower.deepstack} with {len(listed)} entries, one for each of the lowest "
            f"text layers, and {TEXT}.num_hidden_layers {layers}"
        )
