"""Plans that were edited or damaged: one line with the place, and never more than that."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from slm_plugin.errors import PlanError
from slm_plugin.plans import PruningPlan
from slm_plugin.session import Session
from tests.fuzz.targets import some_plans
from tests.tiny import make_model, random_tokens

Tree = dict[str, Any]


@pytest.fixture(scope="module")
def plans() -> dict[str, str]:
    """Plans of a tiny model by strategy, as JSON."""
    session = Session(make_model(num_hidden_layers=4), calibration=random_tokens())
    return {plan.pruner: plan.to_json() for plan in some_plans(session)}


def changed(text: str, path: str, value: Any) -> str:
    """A plan with one value replaced."""
    tree: Any = json.loads(text)
    *above, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    at = tree
    for part in above:
        at = at[part]
    at[last] = value
    return json.dumps(tree)


ALL = {"op": "drop_layers", "indices": [0, 1, 2, 3]}
SHAPE = {
    "layers": 3,
    "mlp_width": 40,
    "kv_groups": 2,
    "parameters": 9000,
    "cost": 0.8,
    "predicted": 0.1,
}
WRONG: list[tuple[str, str, Any, str]] = [
    ("deepest", "operations.0.indices", [2, 10**12], "operations.0.drop_layers.indices.1"),
    ("deepest", "operations.0.indices", [2, 2**31 - 1], r"names layer 2147483647; .* 0 to 3"),
    ("deepest", "operations.0.indices", [2, -1], "operations.0.drop_layers.indices.1"),
    ("deepest", "operations.0.indices", [2, 2], "operations.0.indices: names layer 2 twice"),
    ("deepest", "operations.0.indices", [2, 3.0], "operations.0.drop_layers.indices.1"),
    ("deepest", "operations.0.indices", [2, "3"], "operations.0.drop_layers.indices.1"),
    ("deepest", "operations.0.indices", [2, True], "operations.0.drop_layers.indices.1"),
    ("deepest", "operations.0.indices", [], "operations.0.drop_layers.indices"),
    ("slm", "operations", [ALL], "they remove every layer"),
    ("slm", "operations", [{**ALL, "indices": [3]}], "promises 2, the operations leave 3"),
    ("deepest", "operations", [], "after.layers: promises 2, the operations leave 4"),
    ("deepest", "operations.0.op", "drop_everything", "operations.0: .*drop_everything"),
    ("deepest", "kind", "width", "operations.0: drop_layers is no operation of a width plan"),
    ("deepest", "after.layers", 5, "after.layers: promises 5, the operations leave 2"),
    ("deepest", "after.parameters", -1, "after.parameters: no model has -1"),
    ("deepest", "before.layers", 10**9, "before.layers: no model has 1000000000"),
    ("deepest", "before.kv_heads", 0, "before.kv_heads: no model has 0"),
    ("deepest", "before.layer_widths", [8, 48], "before.layer_widths: 2 widths do not describe 4"),
    ("deepest", "before.layer_widths", [0, 8, 9, 48], "before.layer_widths: 4 widths"),
    ("deepest", "before.layer_widths", [8, 8, 48, 48], "8 to 48 MLP channels are neither dropped"),
    ("deepest", "before.kv_heads", 2**40, "before.kv_heads: no model has"),
    ("deepest", "fingerprint", 3, "fingerprint: "),
    ("deepest", "adherence", 7.0, "adherence: .*less than or equal to 1"),
    ("deepest", "loss_before", -0.5, "loss_before: .*greater than or equal to 0"),
    ("deepest", "loss_after", float("inf"), "loss_after: .*finite number"),
    ("deepest", "frontier", [{**SHAPE, "layers": 0}], "frontier.0.layers: .*equal to 1"),
    ("deepest", "frontier", [{**SHAPE, "cost": -1.0}], "frontier.0.cost: .*greater than 0"),
    ("deepest", "frontier", [{**SHAPE, "measured": float("nan")}], "frontier.0.measured: .*finite"),
    ("deepest", "fingerprint.weights", None, "fingerprint.weights: "),
    ("deepest", "target", {"ratio": 0.1, "layers_removed": 1}, "target: .*exactly one"),
    ("slm", "operations.0.last", 10**12, "operations.0.merge_layers.last"),
    ("slm", "operations.0.last", 2**31 - 1, "operations.0: names layer 2147483647"),
    ("slm", "operations.0.rule", "average", "operations.0.rule: no merge rule is called 'average'"),
    ("slm", "operations.0.rule", "weighted(1,1.2.3)", "has a weight that is no number"),
    ("slm", "operations.0.rule", "weighted(1)", "operations.0.rule: .* is for 1 layers"),
    ("slm", "operations.0.rule", "ema(9.5)", "has a weight that is not from 0 to 1"),
    ("slm", "operations.0.rule", "weighted(1,-1,0)", "operations.0.rule: "),
    ("merge_concat", "operations.0.parts.1.layer", 2**31 - 1, "consecutive layers"),
    ("sublayer", "operations.0.mlp", [9], "operations.0.mlp: names layer 9"),
    ("torch_pruning", "operations.0.layer", 9, "operations.0.layer: names layer 9"),
    ("torch_pruning", "operations.0.indices", [0, 99], "operations.0.indices: names channel 99"),
]


@pytest.mark.parametrize(("pruner", "path", "value", "words"), WRONG)
def test_a_contradiction_is_told_with_its_place(
    plans: dict[str, str], pruner: str, path: str, value: Any, words: str
) -> None:
    """When the plan is read: nothing is built from numbers that no model has."""
    text = plans[pruner]
    with pytest.raises(PlanError, match=words) as caught:
        PruningPlan.parse(changed(text, path, value))
    assert "\n" not in caught.value.message and len(caught.value.message) < 500
    assert PruningPlan.parse(text).to_json() == text


def test_two_operations_cannot_take_one_layer(plans: dict[str, str]) -> None:
    """A merge of layers that another operation drops names both."""
    drop = {"op": "drop_layers", "indices": [3]}
    merge = {"op": "merge_layers", "first": 2, "last": 3}
    with pytest.raises(PlanError, match=r"operations\.1: .* layer 3 is taken already by"):
        PruningPlan.parse(changed(plans["deepest"], "operations", [drop, merge]))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "not JSON at line 1"),
        (b"[" * 100_000, "it nests too deep"),
        (b'{"format": ' + b"9" * 5000 + b"}", "a number is too long"),
        (b'{"format": 1e400}', "format: "),
        (b'{"format": 1, "format": 1}', "the key 'format' is given twice"),
        (b'{"a": {"b": 1, "b": 2}}', "the key 'b' is given twice"),
        (b"\xff\xfe{\x00}\x00", "it is UTF-16"),
        (b"{\xff}", "it is not UTF-8 text"),
        (b'{"operations": [' + b"1," * 1_000_000 + b"1]}", "is not a valid plan"),
    ],
)
def test_what_is_no_plan_is_told(tmp_path: Path, content: bytes, words: str) -> None:
    """Soon, whatever its size."""
    file = tmp_path / "plan.json"
    file.write_bytes(content)
    started = time.process_time()
    with pytest.raises(PlanError, match=words):
        PruningPlan.read(file)
    assert time.process_time() - started < 30


def test_a_byte_order_mark_is_no_matter(tmp_path: Path, plans: dict[str, str]) -> None:
    """As editors of Windows write it."""
    file = tmp_path / "plan.json"
    file.write_text(plans["slm"], encoding="utf-8-sig")
    assert PruningPlan.read(file).to_json() == plans["slm"]
