"""The families: one record per stack of layers of a class, asked by everything that differs."""

from __future__ import annotations

from collections.abc import Callable

from slm_plugin.errors import SlmError, UnsupportedModelError, UserError
from slm_plugin.foreign import contained
from slm_plugin.models.families.encoders import ENCODERS
from slm_plugin.models.families.family import Family
from slm_plugin.models.families.gemma import GEMMA2, GEMMA3
from slm_plugin.models.families.gpt import FALCON, GPT2, GPT_NEOX, OPT
from slm_plugin.models.families.llama import GRANITE, LLAMA, MISTRAL, QWEN2, QWEN3, SMOLLM3
from slm_plugin.models.families.moe import GPT_OSS, MIXTRAL, QWEN2_MOE, QWEN3_MOE
from slm_plugin.models.families.olmo import OLMO2, OLMO3
from slm_plugin.models.families.others import PHI3, STABLELM
from slm_plugin.models.families.towers import GEMMA3_TOWER, LLAVA, QWEN3_VL
from slm_plugin.progress import say
from slm_plugin.registry.installed import distribution_of, points

GROUP = "slm_plugin.families"
_BUILT_IN = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    SMOLLM3,
    GRANITE,
    GEMMA2,
    GEMMA3,
    OLMO2,
    OLMO3,
    STABLELM,
    PHI3,
    GPT_NEOX,
    OPT,
    GPT2,
    FALCON,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    GPT_OSS,
    GEMMA3_TOWER,
    QWEN3_VL,
    LLAVA,
    *ENCODERS,
)
_known: dict[tuple[str, str], Family] = {(f.architecture, f.stack): f for f in _BUILT_IN}
_asked: set[str] = set()


def register_family(family: Family) -> Family:
    """Add a family, so that models of its class can be pruned.

    Raises:
        UserError: Another family is registered for its class or its model type.
    """
    for other in _known.values():
        # A record made from a model says nothing of the next one.
        if not other.listed or family.stack != other.stack or family == other:
            continue
        same_type = family.listed and family.model_type == other.model_type
        if same_type or family.architecture == other.architecture:
            raise UserError(
                f"a family for {other.architecture} ({other.model_type}) is registered already",
                hint="one record holds what is true of a class",
            )
    _known[family.architecture, family.stack] = family
    return family


def families() -> tuple[Family, ...]:
    """All families, built-in ones first; installed plugins are imported once.

    A plugin that cannot be used is named in one line and left out.
    """
    for point in points(GROUP):
        said = f"the family plugin '{point.name}' of {distribution_of(point)}"
        if said in _asked:
            continue
        _asked.add(said)
        hint = "update or uninstall the package that provides it"
        try:
            with contained(f"{said} cannot be imported", UserError, hint, computes=False):
                found = point.load()
            if not isinstance(found, Family):
                raise UserError(f"{said} is a {type(found).__name__}, not a Family")
            register_family(found)
        except SlmError as error:
            say(f"warning: {error.message}")
    return tuple(family for family in _known.values() if family.listed)


def is_known(architecture: str) -> bool:
    """Whether a person has written a record for a model class."""
    return bool(_of(lambda family: family.listed and family.covers(architecture)))


def reads_tensors(architecture: str, stack: str) -> bool:
    """Whether a class that may be unknown here is an encoder, or part of one and a decoder."""
    return is_known(architecture) and family_of(architecture, stack).by_tensors


def family_of(architecture: str, stack: str | None = None) -> Family:
    """The family of a model class.

    Args:
        architecture: Name of the class.
        stack: Which of its two stacks of layers, where it has two.

    Raises:
        UnsupportedModelError: There is none.
        UserError: The class has two stacks and none is named, or it has no such stack.
    """
    if exact := _known.get((architecture, stack or "")):
        return exact
    found = _of(lambda family: family.covers(architecture))
    if not found:
        raise UnsupportedModelError(
            f"architecture {architecture} is not supported", hint=f"supported: {_names()}"
        )
    return _chosen(found, architecture, stack)


def family_of_type(model_type: str | None, file: str, stack: str | None = None) -> Family:
    """The family that a ``config.json`` means by its model type alone.

    Raises:
        UnsupportedModelError: There is none.
        UserError: It has two stacks and none is named, or it has no such stack.
    """
    found = _of(lambda family: family.model_type == model_type)
    if not found:
        raise UnsupportedModelError(
            f"{file}: model type {model_type or '(none)'} is not supported",
            hint=f"supported: {_names()}",
        )
    return _chosen(found, found[0].architecture, stack)


def _of(wanted: Callable[[Family], bool]) -> list[Family]:
    """The records that are wanted; plugins are imported where no other is."""
    return [f for f in _known.values() if wanted(f)] or [f for f in families() if wanted(f)]


def _chosen(found: list[Family], name: str, stack: str | None) -> Family:
    for family in found:
        if family.stack == (stack or ""):
            return family
    stacks = " or ".join(family.stack for family in found if family.stack)
    if not stacks:
        raise UserError(f"{name} has one stack of layers, no '{stack}'", hint="remove `stack`")
    if stack:
        raise UserError(f"{name} has no stack '{stack}'", hint=f"name {stacks}")
    raise UserError(
        f"{name} has two stacks of layers, and `stack` does not say which", hint=f"name {stacks}"
    )


def _names() -> str:
    return ", ".join(sorted({family.architecture for family in families()}))
