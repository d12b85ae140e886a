"""The families of decoders: one record per model class, asked by everything that differs."""

from __future__ import annotations

from slm_plugin.errors import SlmError, UnsupportedModelError, UserError
from slm_plugin.foreign import contained
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
)
_known: dict[str, Family] = {family.architecture: family for family in _BUILT_IN}
_asked: set[str] = set()


def register_family(family: Family) -> Family:
    """Add a family, so that models of its class can be pruned.

    Raises:
        UserError: Another family is registered for its class or its model type.
    """
    for other in _known.values():
        same = family.architecture == other.architecture or family.model_type == other.model_type
        if same and family != other:
            raise UserError(
                f"a family for {other.architecture} ({other.model_type}) is registered already",
                hint="one record holds what is true of a class",
            )
    _known[family.architecture] = family
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
    """Whether there is a record for a model class."""
    return architecture in _known or architecture in {f.architecture for f in families()}


def family_of(architecture: str) -> Family:
    """The family of a model class.

    Raises:
        UnsupportedModelError: There is none.
    """
    if architecture not in _known:
        families()
    if architecture not in _known:
        raise UnsupportedModelError(
            f"architecture {architecture} is not supported", hint=f"supported: {_names()}"
        )
    return _known[architecture]


def family_of_type(model_type: str | None, file: str) -> Family:
    """The family that a ``config.json`` means by its model type alone.

    Raises:
        UnsupportedModelError: There is none.
    """
    for known in (_known.values, families):
        for family in known():
            if family.model_type == model_type:
                return family
    raise UnsupportedModelError(
        f"{file}: model type {model_type or '(none)'} is not supported",
        hint=f"supported: {_names()}",
    )


def _names() -> str:
    return ", ".join(sorted(family.architecture for family in families()))
