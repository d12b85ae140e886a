"""Check one part of a recipe against its schema and collect what is wrong with it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal, TypeVar, get_args, get_origin

from pydantic import BaseModel, ValidationError

from slm_plugin.calibration.samples import CalibrationSource
from slm_plugin.errors import SlmError
from slm_plugin.extras import require
from slm_plugin.foreign import contained, is_ours
from slm_plugin.recipe.mistakes import Mistakes, Place, Placed, Problem
from slm_plugin.registry import Registry, nearest
from slm_plugin.texts import shown

M = TypeVar("M", bound=BaseModel)
# Texts that other YAML readers take for true, false or a number.
_YES = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}
_GROUPED = re.compile(r"[-+]?[0-9]{1,3}(?:[_,' ][0-9]{3})+")


_DECIMAL_COMMA = re.compile(r"[-+]?(?:0,[0-9]+|[0-9]+,(?:[0-9]{1,2}|[0-9]{4,}))")
# Messages of pydantic that use Python's type names.
_YAML = {
    "bool_type": "should be true or false",
    "tuple_type": "should be a list",
    "list_type": "should be a list",
    "string_type": "should be a text",
    "none_required": "should be null",
}


def validated(model: type[M], data: Any, mistakes: Mistakes) -> M | None:
    """Validate strictly: a quoted number is not a number, ``true`` is not 1.

    Args:
        model: The schema.
        data: The data at the place that is being checked.
        mistakes: Grows by what is wrong.

    Returns:
        The data, None where they have mistakes.
    """
    try:
        made = _made(model, json.dumps(data, default=_written_out))
        loose = list(_loosely_equal(model, data, mistakes.place))
        mistakes.extend(loose)
        return None if loose else made
    except SlmError as error:
        mistakes.add(str(error))
    except ValidationError as error:
        mistakes.extend(_told(model, data, mistakes.place, error))
    except (TypeError, ValueError) as error:
        mistakes.add(f"cannot be read: {error}")
    return None


def unboxed(value: Any) -> Any:
    """The number in a scalar of NumPy or PyTorch; any other value as it is."""
    return value.item() if getattr(value, "shape", None) == () else value


def _written_out(value: Any) -> Any:
    """A value that JSON does not know, as a number or a text."""
    number = unboxed(value)
    return str(value) if number is value else number


def _told(
    model: type[BaseModel], data: Any, place: Place, error: ValidationError
) -> Iterator[Problem]:
    """One mistake per place in the file."""
    at: dict[Place, list[dict[str, Any]]] = {}
    for one in error.errors():
        at.setdefault(_written(data, tuple(one["loc"]), one["type"]), []).append(dict(one))
    for path, found in at.items():
        # Invalid entries are removed from a list, so an error about its length may be spurious.
        below = any(other[: len(path)] == path for other in at if other != path)
        if below and all(one["type"] == "too_short" for one in found):
            continue
        # If a value may have several forms, only the error of the matching form counts.
        nearest_form = [one for one in found if not one["type"].endswith(("_type", "_error"))]
        said = [_message(model, path, one) for one in nearest_form or found]
        yield Problem((*place, *path), _either(said))


def _either(said: list[str]) -> str:
    """One message for several with the same start and end."""
    first, *others = dict.fromkeys(said)
    for other in others:
        middle = other.removeprefix("should be ").partition(", not ")[0]
        head, comma, tail = first.partition(", not ")
        first = f"{head} or {middle}{comma}{tail}"
    return first


def _written(data: Any, path: Place, kind: str) -> Place:
    """A place without the names of the forms that pydantic tried."""
    found: list[str | int] = []
    for part in path:
        if (isinstance(data, dict) and part in data) or _is_index(data, part):
            data = data[part]
        elif not (kind == "missing" and part == path[-1]):
            continue
        found.append(part)
    return tuple(found)


def _is_index(data: Any, part: str | int) -> bool:
    return isinstance(data, list) and isinstance(part, int) and part < len(data)


def _loosely_equal(model: type[BaseModel], data: Any, place: Place) -> Iterator[Problem]:
    """Check for values that Python considers equal: true and 1.0 equal 1."""
    for name, field in model.model_fields.items():
        if not isinstance(data, dict) or name not in data:
            continue
        given, annotation = data[name], field.annotation
        if isinstance(given, dict):
            inner = next(_models(annotation), None)
            if inner is not None:
                yield from _loosely_equal(inner, given, (*place, name))
        allowed = [value for value in _literals(annotation) if value == given]
        if allowed and all(type(value) is not type(given) for value in allowed):
            said = " or ".join(_plain(value) for value in allowed)
            yield Problem((*place, name), f"should be {said}{_found(given)}")


def _literals(annotation: Any) -> Iterator[Any]:
    if get_origin(annotation) is Literal:
        yield from get_args(annotation)
        return
    for inner in get_args(annotation):
        yield from _literals(inner)


def _models(annotation: Any) -> Iterator[type[BaseModel]]:
    for one in (annotation, *get_args(annotation)):
        if isinstance(one, type) and issubclass(one, BaseModel):
            yield one


def _made(model: type[M], text: str) -> M:
    if is_ours(model):
        return model.model_validate_json(text, strict=True)
    said = f"{model.__module__}.{model.__qualname__} failed"
    with contained(said, hint="report it to the plugin's author", passing=(ValidationError,)):
        return model.model_validate_json(text, strict=True)


def known_class(registry: Registry[Any], name: Any, mistakes: Mistakes) -> Any | None:
    """The class of a name; None, and a mistake that lists the known names, where there is none.

    Missing optional packages of the class are another mistake.
    """
    registry.tell_shadowed(str(name))
    with mistakes.caught():
        found = registry.get(str(name))
        if found.extra is not None:
            with mistakes.caught():
                require(found.extra, f"'{found.name}'")
        return found
    return None


def unstreamable(
    components: Iterable[Placed[Any]], calibration: CalibrationSource | None
) -> Iterator[Problem]:
    """Problems of components that need the whole model when model.memory is layerwise.

    Args:
        components: Those of the file.
        calibration: The calibration source.
    """
    for one in components:
        if not one.component.streams:
            yield Problem(
                one.place,
                f"'{one.component.name}' needs the whole model and model.memory is layerwise; "
                "remove it or set `memory: whole`",
            )
        elif reason := one.component.whole_model:
            yield Problem(
                one.place,
                f"'{one.component.name}' needs the whole model, because {reason}, and "
                "model.memory is layerwise",
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
        name = str(path[-1])
        holder = _model_at(model, path[:-1])
        former = getattr(holder, "former", {})
        if name in former:
            return f"'{name}' is no option any more: remove it; {former[name]}"
        known = [] if holder is None else list(holder.model_fields)
        guess = nearest(name, known)
        hint = f"did you mean '{guess}'?" if guess else f"known: {', '.join(known) or 'none'}"
        return f"unknown key '{shown(name)}'; {hint}"
    if kind == "missing":
        return f"the key '{path[-1]}' is missing"
    if kind in ("model_type", "dict_type", "model_attributes_type"):
        return "should be a mapping of keys to values"
    found = error.get("input")
    silent = found == "" or kind == "value_error" or isinstance(found, dict | list)
    said = "" if silent else _found(found)
    return _wording(kind, text, error.get("ctx", {})) + said + _remedy(kind, found)


def _wording(kind: str, text: str, context: dict[str, Any]) -> str:
    """The requirement, in terms of YAML."""
    least, most = context.get("min_length"), context.get("max_length")
    if kind == "string_too_short":
        return "should not be empty" if least == 1 else f"should have {least} characters or more"
    if kind == "string_too_long":
        return f"should have at most {most} characters"
    if kind == "too_short":
        return "should not be an empty list" if least == 1 else f"should have {least} entries"
    if kind == "too_long":
        return f"should have at most {most} entries"
    if kind == "string_pattern_mismatch":
        return "does not have the form described in `slm-plugin list`"
    return _YAML.get(kind) or text.removeprefix("Input ")


def _found(value: Any) -> str:
    return f", not {shown(_plain(value))}"


def _plain(value: Any) -> str:
    """A value as YAML has it."""
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "null"}[value]
    return repr(value)


def _remedy(kind: str, found: Any) -> str:
    """A correction for a text that looks like another type."""
    if not isinstance(found, str):
        return ""
    word = found.strip()
    if kind == "bool_type" and (plain := _YES.get(word.lower())):
        return f"; write {plain}"
    if kind == "float_type" and _DECIMAL_COMMA.fullmatch(word):
        return f"; write {word.replace(',', '.')}"
    if kind in ("int_type", "float_type") and _GROUPED.fullmatch(word):
        return f"; write {re.sub('[^-+0-9]', '', word)}"
    return ""


def _model_at(model: type[BaseModel], path: Place) -> type[BaseModel] | None:
    """The model that describes a place inside a model; None where there is none."""
    for part in path:
        field = model.model_fields.get(str(part))
        found = None if field is None else next(_models(field.annotation), None)
        if found is None:
            return None
        model = found
    return model
