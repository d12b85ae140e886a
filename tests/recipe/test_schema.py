"""The JSON Schema of recipes agrees with the parser."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from slm_plugin.recipe.schema import schema
from tests.recipe.bad_recipes import BAD, GOOD

jsonschema = pytest.importorskip("jsonschema")

# What a schema cannot say: files, sums, and rules between keys.
BEYOND = {
    "twice", "calibration file", "calibration needed", "two targets", "empty target", "idle of",
    "target kind", "ratios", "idle norm", "evaluation file", "merge rule", "not yaml", "tab",
    "python tag", "own alias", "empty",
}  # fmt: skip


def validator() -> Any:
    """A validator for the schema as it is now."""
    made = schema()
    jsonschema.Draft202012Validator.check_schema(made)
    return jsonschema.Draft202012Validator(made)


def test_the_schema_accepts_the_good_recipe() -> None:
    """Editors show no error in a recipe that the parser takes."""
    assert list(validator().iter_errors(yaml.safe_load(GOOD))) == []


def test_the_schema_refuses_what_it_can_express() -> None:
    """Every mistake that a schema can express is refused by it too."""
    check = validator()
    for bad in BAD:
        if bad.name not in BEYOND:
            data = yaml.safe_load(GOOD.replace(bad.old, bad.new))
            assert list(check.iter_errors(data)), bad.name
