"""What a component gives back, held to the form that a file of it would have."""

from __future__ import annotations

import json
import math
from functools import partial
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from slm_plugin.errors import ContractError, PlanError
from slm_plugin.evaluation.base import Measurement
from slm_plugin.foreign import contained, is_ours
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.plans import PruningPlan
from slm_plugin.pruners.base import Pruner, missed
from slm_plugin.registry.contract import article
from slm_plugin.texts import first_problem, shown

M = TypeVar("M", bound=BaseModel)
_HINT = "tell its author"
# Bits of an integer; JSON knows no bound, readers do.
_WIDEST = 1024


def called(component: object) -> str:
    """What messages call a component: a plugin with its distribution."""
    name = getattr(component, "name", type(component).__name__)
    return str(getattr(component, "_slm_plugin_label", "") or f"'{name}'")


def returned(value: object, kind: type[M], component: object) -> M:
    """What a component gave back; of a plugin's it is a copy, read anew from its JSON.

    A plugin may build a record without validation, put anything into its options, or derive a
    class of its own. Whatever cannot be written and read again unchanged in kind is refused here,
    before surgery, a report or a cache meets it.

    Args:
        value: What was given back.
        kind: What it has to be.
        component: Who gave it back.

    Raises:
        ContractError: It is something else, or no file could hold it.
    """
    said = f"{called(component)} gave back"
    if not isinstance(value, kind):
        found = article(type(value).__name__)
        raise ContractError(f"{said} {found}, not {kind.__name__}", hint=_HINT)
    if is_ours(component):
        return value
    said += f" {article(kind.__name__)} that cannot be used"
    with contained(said, ContractError, _HINT):
        wrong, text = _written(value, kind)
        try:
            if not wrong:
                return _read(text, kind)
        except PlanError as error:
            wrong = error.message.partition(": ")[2]
        except ValidationError as error:
            wrong = first_problem(error)
        raise ContractError(f"{said}: {wrong}", hint=_HINT)


def several(value: object, kind: type[M], component: object) -> list[M]:
    """The same of a list or a tuple.

    Raises:
        ContractError: It is something else, or one of its parts is.
    """
    if not isinstance(value, list | tuple):
        found = article(type(value).__name__)
        raise ContractError(
            f"{called(component)} gave back {found}, not a list of {kind.__name__}",
            hint=_HINT,
        )
    return [returned(one, kind, component) for one in list(value)]


def answered(
    plan: PruningPlan, pruner: Pruner, asked: dict[str, Any], original: Dimensions
) -> PruningPlan:
    """A plan held to what was asked for; one that misses a size by much says so.

    Args:
        plan: What the strategy gave back.
        pruner: The strategy.
        asked: What the plan must say of the model and the target, by field.
        original: The model as it was loaded.

    Raises:
        ContractError: The plan is for another model or target, or removes another number of
            layers than the target names.
    """
    said = called(pruner)
    for field, value in asked.items():
        if getattr(plan, field) != value:
            what = "target" if field == "target" else "model"
            raise ContractError(
                f"{said} gave back a plan for another {what}: its {field} differs",
                hint=_HINT,
            )
    wrong = missed(plan.target, plan, original)
    if wrong and plan.target.layers_removed is not None:
        raise ContractError(f"{said} missed its target: {wrong}", hint=_HINT)
    if wrong and not is_ours(pruner):
        return plan.model_copy(update={"warnings": (*plan.warnings, f"target missed: {wrong}")})
    return plan


def _written(value: BaseModel, kind: type[BaseModel]) -> tuple[str, str]:
    """The JSON of a record's fields, or the first field that JSON does not hold and why."""
    # By the schema of the kind itself: a subclass may write what it likes.
    dump = partial(kind.__pydantic_serializer__.to_python, value, warnings=False)
    fields = {}
    for name in kind.model_fields:
        try:
            # In JSON, NaN would be null already.
            wrong = _unwritable(dump(include={name}), kind is not Measurement)
            if wrong:
                return wrong, ""
            fields.update(dump(mode="json", include={name}))
        except Exception as error:
            return f"{_blamed(value, name)}: {shown(error, 200)}", ""
    return "", json.dumps(fields)


def _blamed(value: BaseModel, name: str) -> str:
    """The entry of a mapping that cannot be written; of anything else its name."""
    from pydantic_core import to_json

    found = getattr(value, name, None)
    for key, entry in found.items() if isinstance(found, dict) else ():
        try:
            to_json(entry)
        except Exception:
            return f"{name}.{shown(key)}"
    return name


def _unwritable(data: Any, finite: bool, place: str = "") -> str:
    """The first place that JSON or UTF-8 does not hold, and why; empty where there is none."""
    if isinstance(data, str):
        wrong = "" if data.isascii() or _is_unicode(data) else "it holds half a character"
    elif isinstance(data, float):
        # A perplexity may overflow, and a report says so.
        wrong = f"it is {data}" if finite and not math.isfinite(data) else ""
    elif isinstance(data, int):
        wrong = "the number is too large" if data.bit_length() > _WIDEST else ""
    else:
        if not isinstance(data, dict):
            data = dict(enumerate(data)) if isinstance(data, list | tuple | set) else {}
        for key, entry in data.items():
            at = f"{place}.{shown(key)}".lstrip(".")
            found = _unwritable(key, finite, at) or _unwritable(entry, finite, at)
            if found:
                return found
        return ""
    return f"{place}: {wrong}" if wrong else ""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read(text: str, kind: type[M]) -> M:
    parse = getattr(kind, "parse", None)
    read: M = parse(text) if parse else kind.model_validate_json(text, strict=True)
    return read
