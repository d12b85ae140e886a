"""Check one part of a recipe against its schema and collect what is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from slm_plugin.calibration.samples import CalibrationSource
from slm_plugin.errors import SlmError
from slm_plugin.extras import require
from slm_plugin.foreign import contained, is_ours
from slm_plugin.recipe.document import Place, Problem
from slm_plugin.registry import Registry, nearest
from slm_plugin.texts import shown

M = TypeVar("M", bound=BaseModel)
C = TypeVar("C", covariant=True)
# What a value is that other readers of YAML take for true, false or a number.
_YES = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
_GROUPED = re.compile(r"[-+]?[0-9]{1,3}(?:[_,' ][0-9]{3})+")


@dataclass(frozen=True, slots=True)
class Placed(Generic[C]):
    """A component and where it stands in the file."""

    place: Place
    component: C


def validated(model: type[M], data: Any, place: Place, problems: list[Problem]) -> M | None:
    """Validate strictly: a quoted number is no number, ``true`` is not 1."""
    try:
        return _made(model, json.dumps(data, default=str))
    except SlmError as error:
        problems.append(Problem(place, str(error)))
        return None
    except (TypeError, ValueError) as error:
        if not isinstance(error, ValidationError):
            problems.append(Problem(place, f"cannot be read: {error}"))
            return None
        for one in error.errors():
            path = tuple(one["loc"])
            problems.append(Problem((*place, *path), _message(model, path, dict(one))))
        return None


def _made(model: type[M], text: str) -> M:
    if is_ours(model):
        return model.model_validate_json(text, strict=True)
    said = f"{model.__module__}.{model.__qualname__} failed"
    with contained(said, hint="tell those who make the plugin", passing=(ValidationError,)):
        return model.model_validate_json(text, strict=True)


def known_class(
    registry: Registry[Any], name: Any, place: Place, problems: list[Problem]
) -> Any | None:
    """The class of a name, or a problem that says which names there are."""
    registry.tell_shadowed(str(name))
    try:
        return registry.get(str(name))
    except SlmError as error:
        problems.append(Problem(place, str(error)))
        return None


def check_extra(component: Any, place: Place, problems: list[Problem]) -> None:
    """Note when the optional packages of a component are missing."""
    if component.extra is None:
        return
    try:
        require(component.extra, f"'{component.name}'")
    except SlmError as error:
        problems.append(Problem(place, str(error)))


def unstreamable(
    components: Iterable[Placed[Any]], calibration: CalibrationSource | None
) -> Iterator[Problem]:
    """What needs the whole model, when its layers are to be read one at a time.

    Args:
        components: Those of the file.
        calibration: The calibration source.
    """
    for one in components:
        if not one.component.streams:
            yield Problem(
                one.place,
                f"'{one.component.name}' needs the whole model and model.memory is layerwise; "
                "leave it out or set `memory: whole`",
            )
    if calibration is not None and calibration.source == "self":
        yield Problem(
            ("calibration", "source"),
            "text of the model's own would read the whole model for every token, as "
            "model.memory is layerwise; name another source",
        )


def _message(model: type[BaseModel], path: Place, error: dict[str, Any]) -> str:
    kind, text = error["type"], str(error["msg"]).removeprefix("Value error, ")
    if kind == "extra_forbidden":
        known = list(_fields(model, path[:-1]))
        guess = nearest(str(path[-1]), known)
        hint = f"did you mean '{guess}'?" if guess else f"known: {', '.join(known) or 'none'}"
        return f"unknown key '{shown(path[-1])}'; {hint}"
    if kind == "missing":
        return f"the key '{path[-1]}' is missing"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return "should be a mapping of keys to values"
    found = error.get("input")
    said = "" if isinstance(found, dict | list) or kind == "value_error" else _found(found)
    return text.removeprefix("Input ") + said + _remedy(kind, found)


def _found(value: Any) -> str:
    return f", not {shown(repr(value))}"


def _remedy(kind: str, found: Any) -> str:
    """What to write instead, where a value is a text that looks like something else."""
    if not isinstance(found, str):
        return ""
    word = found.strip()
    if kind == "bool_type" and (plain := _YES.get(word.lower())):
        return f"; write {plain}"
    if kind in ("int_type", "float_type") and _GROUPED.fullmatch(word):
        return f"; write {re.sub('[^-+0-9]', '', word)}"
    return ""


def _fields(model: type[BaseModel], path: Place) -> Iterator[str]:
    """Keys that are known at a place inside a model."""
    for part in path:
        field = model.model_fields.get(str(part))
        inner = [] if field is None else [field.annotation, *get_args(field.annotation)]
        found = next((t for t in inner if isinstance(t, type) and issubclass(t, BaseModel)), None)
        if found is None:
            return
        model = found
    yield from model.model_fields
