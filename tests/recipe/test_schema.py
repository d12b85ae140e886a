"""The JSON Schemas of recipes and comparisons agree with the parser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from slm_plugin.comparison.schema import comparison_schema
from slm_plugin.recipe.schema import schema
from tests.recipe.bad_recipes import BAD, GOOD

jsonschema = pytest.importorskip("jsonschema")

# What a schema cannot say: files, sums, and rules between keys.
BEYOND = {
    "twice", "calibration file", "calibration needed", "two targets", "empty target", "idle of",
    "latency of nothing", "latency of both", "latency of no use", "memory of no use",
    "idle of memory",
    "target kind", "ratios", "idle norm", "evaluation file", "merge rule",
    "merge rule of repaired", "start without polish", "start of no name", "start that merges",
    "option that a start lacks", "start with a target", "start with a wrong option",
    "not yaml", "tab",
    "python tag", "own alias", "empty", "no shard", "other digits of a rule", "threshold above",
    "threshold below", "positive divergence", "budget of a threshold", "released size", "own text",
    "no such folder", "no such folder below", "no such gguf", "model is a file",
    "no include_path at all", "no such task", "version is a float", "norm is a float",
    "after an allocation", "pooled ranks", "idle spread",
}  # fmt: skip


ROOT = Path(__file__).parents[2]


def validator(made: Any = None) -> Any:
    """A validator for a schema, by default that of recipes as it is now."""
    made = made or schema()
    jsonschema.Draft202012Validator.check_schema(made)
    return jsonschema.Draft202012Validator(made)


def test_the_schema_accepts_the_good_recipe() -> None:
    """Editors show no error in a recipe that the parser takes."""
    assert list(validator().iter_errors(yaml.safe_load(GOOD))) == []


@pytest.mark.parametrize(
    "target",
    [{"parameters": "1.2B"}, {"parameters": 9}, {"memory": "300 MiB"}, {"latency": {"decode": 1}}],
)
def test_the_schema_knows_units(target: dict[str, Any]) -> None:
    """What the parser reads as a number may be written with its unit; a share is below 1."""
    data = yaml.safe_load(GOOD)
    data["stages"][0]["target"] = target
    assert (list(validator().iter_errors(data)) == []) == ("latency" not in target)


def test_the_schema_refuses_what_it_can_express() -> None:
    """Every mistake that a schema can express is refused by it too."""
    check = validator()
    for bad in BAD:
        if bad.name not in BEYOND:
            data = yaml.safe_load(GOOD.replace(bad.old, bad.new))
            assert list(check.iter_errors(data)), bad.name


@pytest.mark.parametrize("file", ["recipes/compare-depth.yaml", "benchmarks/compare_methods.yaml"])
def test_the_schema_accepts_the_comparisons_that_are_shipped(file: str) -> None:
    """Methods with labels and recoveries of their own, and the word none."""
    data = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
    assert list(validator(comparison_schema()).iter_errors(data)) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("methods", [{"prune": "slmm"}]),
        ("methods", [{"prune": "slm", "serach": "greedy"}]),
        ("methods", [{"prune": "slm", "target": {"layers_removed": 3}}]),
        ("methods", [{"prune": "slm", "recover": []}]),
        ("methods", []),
        ("recover", ["nothing"]),
        ("recover", [{"recover": "refit", "o_proj": "yes"}]),
        ("targets", [{"layers_removed": "3"}]),
        ("evaluate", [{"perplexity": {"lenght": 128}}]),
        ("stages", []),
    ],
)
def test_the_schema_of_comparisons_refuses_mistakes(key: str, value: object) -> None:
    """Misspelt names and keys, wrong types, and keys of recipes."""
    text = (ROOT / "recipes/compare-depth.yaml").read_text(encoding="utf-8")
    data = {**yaml.safe_load(text), key: value}
    assert list(validator(comparison_schema()).iter_errors(data))
