"""Shared by recipes and comparisons: common keys and named components."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, Field, create_model

from slm_plugin.calibration.samples import CalibrationSource
from slm_plugin.counts import Seed
from slm_plugin.errors import SlmError, UserError
from slm_plugin.evaluation.base import Evaluator
from slm_plugin.export.base import Exporter
from slm_plugin.models.bundled import BUNDLED, check_cache
from slm_plugin.models.loading import ModelSource, check_name
from slm_plugin.pruners.base import Pruner
from slm_plugin.recipe.checking import Placed, check_extra, known_class, validated
from slm_plugin.recipe.document import Place, Problem
from slm_plugin.record import Record
from slm_plugin.recovery.base import Recovery
from slm_plugin.registry import Registry
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
    return value


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


def named_entry(
    registry: Registry[Any], entry: Any, place: Place, problems: list[Problem]
) -> Any | None:
    """An entry such as ``perplexity: {length: 128}``, or a bare ``perplexity``."""
    if isinstance(entry, Evaluator | Exporter):
        return entry
    if isinstance(entry, str):
        entry = {entry: {}}
    if not isinstance(entry, dict) or len(entry) != 1:
        problems.append(
            Problem(place, f"an entry names one {registry.kind}, as `{registry.names()[0]}: {{}}`")
        )
        return None
    name, options = next(iter(entry.items()))
    options = {} if options is None else options
    return component(registry, name, options, (*place, str(name)), None, problems)


def named_entries(
    registry: Registry[Any], data: dict[str, Any], key: str, problems: list[Problem]
) -> list[Placed[Any]]:
    """The components of a list whose entries name one each."""
    found = []
    for index, entry in entries(data, key):
        made = named_entry(registry, entry, (key, index), problems)
        if made is not None:
            found.append(Placed((key, index, made.name), made))
    return found


def stored_layers(model: str) -> int | None:
    """Number of layers of a bundled model or of a folder's config; None where unknown."""
    if model in BUNDLED:
        return BUNDLED[model].layers
    try:
        file = Path(model).expanduser() / "config.json"
        if not file.is_file():
            return None
        config = json.loads(read_text(file, "the config", UserError, LARGEST_CONFIG))
    except (OSError, ValueError, RecursionError, RuntimeError, UserError):
        # Errors of a model are reported when it is loaded.
        return None
    layers = config.get("num_hidden_layers") if isinstance(config, dict) else None
    return layers if type(layers) is int and layers > 0 else None


def component(
    registry: Registry[Any],
    name: Any,
    options: Any,
    place: Place,
    verb: str | None,
    problems: list[Problem],
) -> Any | None:
    """A recovery, evaluator or exporter with its options; None, with problems added, on a mistake.

    Args:
        registry: The registry of its kind.
        name: The name in the file.
        options: The options in the file.
        place: The place of the entry.
        verb: The key with the name, if the options are beside it.
        problems: Mistakes are added to it.
    """
    before = len(problems)
    named = (*place, verb) if verb else place
    found = known_class(registry, name, named, problems)
    if found is None:
        return None
    checked = validated(found.Options, options, place, problems)
    check_extra(found, named, problems)
    if checked is None or len(problems) > before:
        return None
    made = found(checked)
    if isinstance(made, Evaluator):
        try:
            made.check()
        except SlmError as error:
            problems.append(Problem((*place, *filter(None, [error.option])), str(error)))
            return None
    return made


def checked_target(pruner: Pruner, place: Place, problems: list[Problem]) -> bool:
    """Whether a strategy's options allow its target; mistakes are added to the problems."""
    try:
        pruner.check()
    except SlmError as error:
        problems.append(Problem((*place, "target", pruner.target.kind), str(error)))
        return False
    return True


def check_surroundings(model: ModelSource, problems: list[Problem]) -> None:
    """Add problems for a model that cannot be found and for an unusable cache folder.

    Args:
        model: The model.
        problems: Mistakes are added to it.
    """
    try:
        check_name(model.id)
    except SlmError as error:
        problems.append(Problem(("model", "id"), str(error)))
    try:
        check_cache()
    except SlmError as error:
        problems.append(Problem((), str(error)))


def check_calibration(
    calibration: CalibrationSource | None,
    wanting: Iterable[Placed[Pruner | Recovery]],
    problems: list[Problem],
) -> None:
    """Add problems for a source that cannot be read, or that is missing and needed.

    Args:
        calibration: The calibration source.
        wanting: Strategies and recoveries.
        problems: Mistakes are added to it.
    """
    if calibration is not None:
        try:
            calibration.check()
        except SlmError as error:
            problems.append(Problem(("calibration", "source"), str(error)))
        return
    for one in wanting:
        if one.component.needs_calibration:
            problems.append(
                Problem(
                    one.place,
                    f"'{one.component.name}' needs calibration data; "
                    "add `calibration: {source: builtin}`",
                )
            )
