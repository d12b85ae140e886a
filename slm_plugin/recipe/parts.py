"""Shared by recipes and comparisons: common keys and named components."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, create_model

from slm_plugin.calibration.samples import CalibrationSource
from slm_plugin.counts import Seed
from slm_plugin.errors import CalibrationError, UnsupportedModelError, UserError
from slm_plugin.evaluation.base import Evaluator
from slm_plugin.export.base import Exporter
from slm_plugin.models.bundled import BUNDLED, check_cache
from slm_plugin.models.families import family_of, family_of_type
from slm_plugin.models.families.family import Family
from slm_plugin.models.families.suitability import complaint
from slm_plugin.models.loading import ModelSource, check_name
from slm_plugin.pruners.base import Pruner
from slm_plugin.recipe.checking import known_class, unboxed, validated
from slm_plugin.recipe.mistakes import Mistakes, Placed, Problem
from slm_plugin.record import Record
from slm_plugin.recovery.base import Recovery
from slm_plugin.registry import Registry, recoveries
from slm_plugin.texts import read_text

# Largest config.json of a model in bytes.
LARGEST_CONFIG = 1 << 24


F = TypeVar("F", bound=BaseModel)


class Common(Record):
    """The top-level keys of every file."""

    version: Annotated[Literal[1], Field(description="format of the recipe")]
    model: Annotated[ModelSource, Field(description="the model to compress")]
    calibration: Annotated[
        CalibrationSource | None, Field(description="data that strategies measure on")
    ] = None
    evaluate: Annotated[
        tuple[Any, ...],
        Field(description="what to measure before and after"),
    ] = ()
    output: Annotated[str, Field(min_length=1, description="folder for everything written")]
    seed: Annotated[Seed, Field(description="seed of everything random")] = 1234


def in_memory(frame: type[F]) -> type[F]:
    """The same keys for a model that the caller holds: it and an output need not be named."""
    return create_model(
        frame.__name__,
        __base__=frame,
        version=(Literal[1], 1),
        model=(ModelSource | None, None),
        output=(str | None, None),
    )


def plain(value: Any) -> Any:
    """A caller's data in the form of a file: lists, and components as names with options."""
    if isinstance(value, Pruner | Recovery | Evaluator | Exporter):
        return _written_down(value, value.options.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return unboxed(value)


def _written_down(
    component: Pruner | Recovery | Evaluator | Exporter, options: dict[str, Any]
) -> dict[str, Any]:
    # A class that was never registered has no name.
    name = getattr(component, "name", type(component).__name__)
    if isinstance(component, Pruner):
        target = component.target.model_dump(exclude_none=True, exclude_defaults=True)
        return {"prune": name, "target": target, **options}
    return {"recover": name, **options} if isinstance(component, Recovery) else {name: options}


def entries(data: dict[str, Any], key: str) -> Iterator[tuple[int, Any]]:
    """The entries of a list with their numbers; none where it is no list."""
    listed = data.get(key)
    if isinstance(listed, list | tuple):
        yield from enumerate(listed)


def named_entry(registry: Registry[Any], entry: Any, mistakes: Mistakes) -> Any | None:
    """An entry such as ``perplexity: {length: 128}``, or a bare ``perplexity``."""
    if isinstance(entry, Evaluator | Exporter):
        return entry
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        mistakes.add(f"an entry names one {registry.kind}, as `{registry.names()[0]}: {{}}`")
        return None
    name, options = next(iter(entry.items()))
    options = {} if options is None else options
    return component(registry, name, options, mistakes.below(str(name)))


def named_entries(
    registry: Registry[Any], data: dict[str, Any], key: str, mistakes: Mistakes
) -> list[Placed[Any]]:
    """The components of a list whose entries name one each."""
    found = []
    for index, entry in entries(data, key):
        made = named_entry(registry, entry, mistakes.below(key, index))
        if made is not None:
            found.append(Placed((key, index, made.name), made))
    return found


def stored_config(model: str) -> Mapping[str, Any]:
    """What is known of a decoder without loading it: the config of a folder or a bundled model."""
    if model in BUNDLED:
        bundled = BUNDLED[model]
        return {"architectures": [bundled.architecture], "num_hidden_layers": bundled.layers}
    try:
        file = Path(model).expanduser() / "config.json"
        if not file.is_file():
            return {}
        config = json.loads(read_text(file, "the config", UserError, LARGEST_CONFIG))
    except (OSError, ValueError, RecursionError, RuntimeError, UserError):
        # Errors of a model are reported when it is loaded.
        return {}
    if not isinstance(config, dict):
        return {}
    text = config.get("text_config")
    if not isinstance(text, dict):
        return config
    # Of a model of images and text, what describes its decoder, by the model's own name.
    names = ("architectures", "model_type")
    return {name: value for name, value in text.items() if name not in names} | {
        name: config[name] for name in names if name in config
    }


def stored_family(config: Mapping[str, Any], stack: str | None) -> Family | None:
    """The family that a `stored_config` means; None where that is not known.

    Raises:
        UserError: Its class has two stacks of layers and none is named, or it has no such stack.
    """
    named = config.get("architectures")
    try:
        return (
            family_of(named[0], stack) if named else family_of_type(config["model_type"], "", stack)
        )
    except (KeyError, TypeError, UnsupportedModelError):
        return None


def stored_layers(config: Mapping[str, Any], family: Family | None) -> int | None:
    """Number of layers that a `stored_config` states; None where unknown."""
    name = "num_hidden_layers"
    if family is not None and family.stack:
        name = family.own_name(name)
    layers = config.get(name)
    return layers if type(layers) is int and layers > 0 else None


def unsuited(
    config: Mapping[str, Any], family: Family | None, components: Iterable[Placed[Any]]
) -> Iterator[Problem]:
    """Problems of components that cannot be used with the model of a `stored_config`."""
    if family is None:
        return
    for one in components:
        found = complaint(one.component, family, config)
        if found:
            yield Problem(one.place, found)


def component(
    registry: Registry[Any],
    name: Any,
    options: Any,
    mistakes: Mistakes,
    verb: str | None = None,
) -> Any | None:
    """A recovery, evaluator or exporter with its options; None where they have mistakes.

    Args:
        registry: The registry of its kind.
        name: The name in the file.
        options: The options in the file.
        mistakes: Grows by what is wrong with the entry.
        verb: The key with the name, if the options are beside it.
    """
    before = len(mistakes.found)
    found = known_class(registry, name, mistakes.below(verb) if verb else mistakes)
    if found is None:
        return None
    checked = validated(found.Options, options, mistakes)
    if checked is None or len(mistakes.found) > before:
        return None
    made = found(checked)
    if isinstance(made, Evaluator):
        with mistakes.caught():
            made.check()
            return made
        return None
    return made


def following(pruner: Pruner, mistakes: Mistakes) -> Recovery | None:
    """The recovery that belongs to a strategy; None where none does.

    Args:
        pruner: The strategy.
        mistakes: Grows by what is wrong with the recovery.
    """
    stage = pruner.followed_by
    if stage is None:
        return None
    options = {key: value for key, value in stage.items() if key != "recover"}
    made: Recovery | None = component(recoveries, stage["recover"], options, mistakes)
    return made


def in_turn(own: Recovery | None, asked: Recovery | None) -> list[Recovery]:
    """What runs behind a strategy: its own recovery, then the one that the file names.

    Where both are the same recovery, it runs once, because twice would fit the same weights twice:
    with the options of the strategy, and over them those that the file gives.

    Args:
        own: The recovery that belongs to the strategy.
        asked: The recovery that directly follows it in the file.
    """
    if own is not None and asked is not None and own.name == asked.name:
        given = {name: getattr(asked.options, name) for name in asked.options.model_fields_set}
        return [type(asked)(own.options.model_copy(update=given))]
    return [one for one in (own, asked) if one is not None]


def check_surroundings(model: ModelSource, mistakes: Mistakes) -> None:
    """Check that the model can be found and that the cache folder can be used."""
    with mistakes.caught("model", "id"):
        check_name(model.id)
    with mistakes.caught():
        check_cache()


def _or(remedy: str) -> str:
    return f" or {remedy}" if remedy else ""


def check_calibration(
    calibration: CalibrationSource | None,
    wanting: Iterable[Placed[Pruner | Recovery]],
    mistakes: Mistakes,
    family: Family | None = None,
) -> None:
    """Check that a calibration source can be read, and that there is one where it is needed.

    Args:
        calibration: The calibration source.
        wanting: Strategies and recoveries.
        mistakes: Grows by what is wrong.
        family: What is true of the model's class, where it is known.
    """
    if calibration is not None:
        with mistakes.caught("calibration", "source"):
            if family is not None and (wrong := calibration.unsuited(family)):
                raise CalibrationError(wrong)
            calibration.check()
        return
    by_tensors = family is not None and family.by_tensors
    usual = "{source: tensors, path: FILE.safetensors}" if by_tensors else "{source: builtin}"
    for one in wanting:
        if one.component.needs_calibration:
            mistakes.at(one.place).add(
                f"'{one.component.name}' needs calibration data; add `calibration: {usual}`"
                + _or(one.component.without_calibration)
            )
