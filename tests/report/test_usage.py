"""How to load what a run exported."""

from __future__ import annotations

import ast
from pathlib import Path

from slm_plugin.report.record import RunReport
from slm_plugin.report.usage import recipe_yaml, snippets
from tests.report import sample_plans, samples


def test_the_checkpoint_comes_first_and_code_compiles(report: RunReport) -> None:
    """Every known export has valid Python that loads its folder."""
    swapped = report.model_copy(update={"exports": report.exports[::-1]})
    found = snippets(swapped)
    assert [exporter for exporter, _ in found] == ["checkpoint", "onnx"]
    for (_, code), name in zip(found, ("AutoModelForCausalLM", "ORTModelForCausalLM"), strict=True):
        ast.parse(code)
        assert f"{name}.from_pretrained(folder)" in code


def test_a_folder_with_quotes_stays_one_string() -> None:
    """The folder's name cannot end the string that holds it."""
    name = 'a"; import os #\\\n'
    export = samples.make_report().exports[0].model_copy(update={"folder": name})
    ((_, code),) = snippets(samples.make_report(exports=(export,)))
    assigned = next(node.value for node in ast.parse(code).body if isinstance(node, ast.Assign))
    assert isinstance(assigned, ast.Constant) and assigned.value == name


def test_pruned_heads_are_told_to_optimum_and_only_then() -> None:
    """The sample's 6 heads of 64 are not its hidden size of 576; the original's 9 are."""
    pruned, whole = (
        dict(snippets(samples.make_report(after=after)))
        for after in (sample_plans.NARROW, sample_plans.SHALLOW)
    )
    assert "embed_size_per_head" in pruned["onnx"]
    assert "embed_size_per_head" not in pruned["checkpoint"] + whole["onnx"]


def test_unknown_exports_have_no_code() -> None:
    """A plugin's format is not guessed at."""
    export = samples.make_report().exports[0].model_copy(update={"exporter": "tflite"})
    assert snippets(samples.make_report(exports=(export,))) == []


def test_the_recipe_keeps_its_order_and_takes_any_value() -> None:
    """What YAML itself cannot represent, as a path, is written as text."""
    recipe = {"version": 1, "model": {"id": Path("a/b")}, "calibration": None}
    text = recipe_yaml(samples.make_report(recipe=recipe))
    assert text == "version: 1\nmodel:\n  id: a/b\ncalibration: null\n"
