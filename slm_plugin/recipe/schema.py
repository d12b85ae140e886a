"""JSON Schema of recipes, for editors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from slm_plugin.recipe.parsing import Frame
from slm_plugin.recipe.parts import Common
from slm_plugin.registry import Registry, evaluators, exporters, pruners, recoveries
from slm_plugin.target import Target

Schema = dict[str, Any]


def schema() -> Schema:
    """Schema of a recipe, with the options of every component that is installed here."""
    made, definitions = framed(Frame, "slm_plugin recipe")
    target: Schema = {"target": {"$ref": "#/$defs/Target"}}
    stages = [
        *verbs(pruners, "prune", definitions, required=target),
        *verbs(recoveries, "recover", definitions),
    ]
    made["properties"]["stages"]["items"] = {"oneOf": stages}
    made["properties"]["export"]["items"] = _entry(exporters, definitions)
    return made


def framed(frame: type[Common], title: str) -> tuple[Schema, Schema]:
    """The schema of the top-level keys of a file, and its definitions, which are extended."""
    made = frame.model_json_schema()
    made["title"] = title
    definitions = made.setdefault("$defs", {})
    definitions["Target"] = _lifted(Target, definitions)
    made["properties"]["evaluate"]["items"] = _entry(evaluators, definitions)
    return made, definitions


def verbs(
    registry: Registry[Any],
    verb: str,
    definitions: Schema,
    *,
    required: Schema | None = None,
    optional: Schema | None = None,
) -> Iterator[Schema]:
    """One schema per component: its verb, with its options and further keys beside it."""
    for name, cls in registry.usable().items():
        options = _lifted(cls.Options, definitions)
        first: Schema = {verb: {"const": name}, **(required or {})}
        options["properties"] = {**first, **(optional or {}), **options.get("properties", {})}
        options["required"] = [*first, *options.get("required", [])]
        yield options


def _entry(registry: Registry[Any], definitions: Schema) -> Schema:
    """An entry of a list whose components are named by their only key, or by a bare name."""
    found = registry.usable()
    return {"oneOf": [*_named(found, definitions), {"enum": [*found]}]}


def _named(found: Mapping[str, Any], definitions: Schema) -> Iterator[Schema]:
    """One schema per component: its name as the only key, its options below."""
    for name, cls in found.items():
        options = _lifted(cls.Options, definitions)
        yield {
            "type": "object",
            "properties": {name: {"anyOf": [options, {"type": "null"}]}},
            "required": [name],
            "additionalProperties": False,
        }


def _lifted(model: type[BaseModel], definitions: Schema) -> Schema:
    """A model's schema, its own definitions moved to the recipe's."""
    made = model.model_json_schema(ref_template="#/$defs/{model}")
    definitions.update(made.pop("$defs", {}))
    return made
