"""JSON Schema of comparisons, for editors."""

from __future__ import annotations

from slm_plugin.comparison.configuration import AS_PRUNED, ComparisonFrame
from slm_plugin.recipe.schema import Schema, framed, verbs
from slm_plugin.registry import pruners, recoveries


def comparison_schema() -> Schema:
    """Schema of a comparison, likewise."""
    made, definitions = framed(ComparisonFrame, "slm_plugin comparison")
    following = [{"const": AS_PRUNED}, *verbs(recoveries, "recover", definitions)]
    recover: Schema = {"items": {"oneOf": following}, "minItems": 1, "type": "array"}
    own: Schema = {"label": {"type": "string"}, "recover": recover}
    methods = verbs(pruners, "prune", definitions, optional=own)
    made["properties"]["methods"]["items"] = {"oneOf": list(methods)}
    made["properties"]["recover"]["items"] = recover["items"]
    made["properties"]["targets"]["items"] = {"$ref": "#/$defs/Target"}
    return made
