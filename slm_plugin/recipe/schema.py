"""JSON Schema of recipes, for editors."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from slm_plugin.recipe.parsing import Frame
from slm_plugin.registry import Registry, evaluators, exporters, pruners, recoveries
from slm_plugin.target import Target

Schema = dict[str, Any]


def schema() -> Schema:
    """Schema of a recipe, with the options of every component that is installed here."""
    made = Frame.model_json_schema()
    made["title"] = "slm_plugin recipe"
    definitions = made.setdefault("$defs", {})
    definitions["Target"] = _lifted(Target, definitions)
    stages = [
        *_stages(pruners, "prune", definitions),
        *_stages(recoveries, "recover", definitions),
    ]
    made["properties"]["stages"]["items"] = {"oneOf": stages}
    for key, registry in (("evaluate", evaluators), ("export", exporters)):
        named = [*_named(registry, definitions), {"enum": registry.names()}]
        made["properties"][key]["items"] = {"oneOf": named}
    return made


def _stages(registry: Registry[Any], verb: str, definitions: Schema) -> Iterator[Schema]:
    """One schema per strategy: its verb, its options beside it, and a pruner's target."""
    for name in registry.names():
        options = _lifted(registry.get(name).Options, definitions)
        first: Schema = {verb: {"const": name}}
        if verb == "prune":
            first["target"] = {"$ref": "#/$defs/Target"}
        options["properties"] = {**first, **options.get("properties", {})}
        options["required"] = [*first, *options.get("required", [])]
        yield options


def _named(registry: Registry[Any], definitions: Schema) -> Iterator[Schema]:
    """One schema per component: its name as the only key, its options below."""
    for name in registry.names():
        options = _lifted(registry.get(name).Options, definitions)
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
