"""JSON Schema of recipes, for editors."""

from __future__ import annotations

from typing import Any

from slm_plugin.recipe.parsing import Frame
from slm_plugin.registry import Registry, evaluators, exporters, pruners, recoveries
from slm_plugin.target import Target


def schema() -> dict[str, Any]:
    """JSON Schema of a recipe with everything installed here, for editors."""
    frame = Frame.model_json_schema()
    frame["title"] = "slm_plugin recipe"
    definitions = frame.setdefault("$defs", {})

    def entries(registry: Registry[Any], key: str | None) -> list[dict[str, Any]]:
        found = []
        for name in registry.names():
            cls = registry.get(name)
            options = cls.Options.model_json_schema(ref_template="#/$defs/{model}")
            definitions.update(options.pop("$defs", {}))
            if key is None:
                found.append(
                    {
                        "type": "object",
                        "properties": {name: options},
                        "required": [name],
                        "additionalProperties": False,
                    }
                )
                continue
            options["properties"] = {key: {"const": name}, **options.get("properties", {})}
            options["required"] = [key, *options.get("required", [])]
            if key == "prune":
                options["properties"]["target"] = {"$ref": "#/$defs/Target"}
                options["required"].append("target")
            found.append(options)
        return found

    target = Target.model_json_schema(ref_template="#/$defs/{model}")
    definitions["Target"] = target
    properties = frame["properties"]
    properties["stages"]["items"] = {
        "oneOf": [*entries(pruners, "prune"), *entries(recoveries, "recover")]
    }
    properties["evaluate"]["items"] = {"oneOf": entries(evaluators, None)}
    properties["export"]["items"] = {"oneOf": entries(exporters, None)}
    return frame
