"""Plans that earlier versions wrote are read and applied: `format: 1` is a promise.

The files are what the commits of 22 November 2026 wrote that first had each operation: ``slm``
(1c63f34, and e0fbbe7 for ``weights_only``), ``torch_pruning`` (1c63f34), ``block_influence`` and
``merge_concat`` (7aa3061), ``sublayer`` (085f4bb); one of 27 November: ``experts`` (0eecc18); and
those that brought ``query_heads``, ``hidden_channels``, ``hidden_score: pca`` and hybrid plans on
28 November. A field that a plan got later is optional; a plan without it means what its version
did.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from slm_plugin.errors import PlanError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.families.llama import LLAMA
from slm_plugin.plans import MergeLayers, PruningPlan
from slm_plugin.registry import pruners
from slm_plugin.session import Session
from slm_plugin.surgery.merge_rules import merged_layer
from slm_plugin.target import Target
from tests.tiny import make_model, random_tokens

FOLDER = Path(__file__).parents[1] / "data" / "plans"
SOURCES = {
    "concat_layers": ((0, 0), (1, 2), (3, 3)),
    "drop_layers": ((0, 0), (1, 1)),
    "drop_sublayers": ((1, 1), (2, 2), (3, 3)),
    "hybrid": ((0, 0), (1, 2), (3, 3)),
    "keep_channels_and_heads": ((0, 0), (1, 1), (2, 2), (3, 3)),
    "keep_experts": ((0, 0), (1, 1), (2, 2), (3, 3)),
    "keep_hidden": ((0, 0), (1, 1), (2, 2), (3, 3)),
    "keep_query_heads": ((0, 0), (1, 1), (2, 2), (3, 3)),
    "merge_layers": ((0, 2), (3, 3)),
    "merge_layers_weights_only": ((0, 2), (3, 3)),
    "rotate_hidden": ((0, 0), (1, 1), (2, 2), (3, 3)),
}
CALIBRATION = random_tokens(4, 8) % 32


def model(family: str = "qwen2") -> PreTrainedModel:
    """A model of the size that the plans are for, with biases."""
    return make_model(
        family,
        **({"moe_intermediate_size": 12} if family == "qwen3_moe" else {}),
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=4,
        head_dim=4,
        vocab_size=32,
        max_position_embeddings=64,
    )


def applied(name: str) -> Session:
    """A session after the plan of a file, which is rewritten only to name the session's model."""
    found = model("qwen3_moe" if name == "keep_experts" else "qwen2")
    # A rotation follows from the calibration set.
    session = Session(found, calibration=CALIBRATION if name == "rotate_hidden" else None)
    tree = json.loads((FOLDER / f"{name}.json").read_text())
    tree["fingerprint"] = session.fingerprint().model_dump()
    plan = PruningPlan.parse(json.dumps(tree))
    require_stated(plan.before, session)
    session.apply(plan)
    require_stated(plan.after, session)
    return session


def require_stated(sizes: Dimensions, session: Session) -> None:
    """The model has the sizes that a plan states; its version may not have known all of them."""
    known = sizes.model_fields_set
    measured = session.view.dimensions()
    assert sizes.model_dump(include=known) == measured.model_dump(include=known)


@pytest.mark.parametrize("name", sorted(path.stem for path in FOLDER.glob("*.json")))
def test_an_earlier_plan_is_applied(name: str) -> None:
    """The result has the layers that the plan names, the size that it states, and runs."""
    session = applied(name)
    assert session.sources == SOURCES[name]
    assert torch.isfinite(session.model(random_tokens(1, 8) % 32).logits).all()


@pytest.mark.parametrize("name", sorted(SOURCES))
def test_operations_are_written_with_the_keys_in_their_order(name: str) -> None:
    """A plan of today differs from one of before in its figures, not in its form."""
    file = FOLDER / f"{name}.json"
    for op, written in zip(
        PruningPlan.read(file).operations, json.loads(file.read_text())["operations"], strict=True
    ):
        assert [key for key in op.model_dump() if key in written] == list(written)


def test_every_operation_has_an_earlier_plan() -> None:
    """A new kind of operation brings a file of its own."""
    files = [PruningPlan.read(path) for path in sorted(FOLDER.glob("*.json"))]
    schema = PruningPlan.model_json_schema()["properties"]["operations"]["items"]
    found = {operation.op for plan in files for operation in plan.operations}
    assert found == set(schema["discriminator"]["mapping"])


def test_a_plan_that_knows_no_experts_is_applied_to_a_mixture() -> None:
    """As the first version with mixtures wrote it (8ba436b)."""
    session = Session(model("qwen3_moe"))
    pruner = pruners.get("deepest")
    tree = json.loads(session.plan(pruner(pruner.Options(), Target(layers_removed=1))).to_json())
    for sizes in (tree["before"], tree["after"]):
        for name in ("experts", "experts_per_token", "expert_parameters"):
            assert sizes.pop(name)
    plan = PruningPlan.parse(json.dumps(tree))
    assert (plan.before.experts, plan.before.units) == (0, {})
    session.apply(plan)
    assert session.view.dimensions().layers == plan.after.layers == 3


def rewritten(*, before: dict[str, int] | None = None, **operation: Any) -> MergeLayers:
    """The operation of the plan that has no ``weights_only``, changed and read again."""
    tree = json.loads((FOLDER / "merge_layers.json").read_text())
    tree["operations"][0].update(operation)
    tree["before"].update(before or {})
    (found,) = PruningPlan.parse(json.dumps(tree)).operations
    assert isinstance(found, MergeLayers)
    return found


def merged(operation: MergeLayers) -> nn.Module:
    """What the operation makes of the model's layers."""
    run = list(model().model.layers)[operation.first : operation.last + 1]
    return merged_layer(operation.rule, run, LLAMA, weights_only=operation.weights_only)


def test_fields_that_an_operation_got_later_are_these() -> None:
    """Another one has to say in `slm_plugin.plans.earlier` what plans without it mean."""
    found = set()
    for file in FOLDER.glob("*.json"):
        written = json.loads(file.read_text())["operations"]
        for operation, keys in zip(PruningPlan.read(file).operations, written, strict=True):
            found |= {(operation.op, name) for name in {*type(operation).model_fields} - {*keys}}
    # Until a rotation could have a basis for every block it had one, which is the default.
    assert found == {("merge_layers", "weights_only"), ("rotate_hidden", "per")}


def test_weights_only_keeps_the_lowest_layers_biases() -> None:
    """The mean of three layers' weights, and the biases of the first of them."""
    before, after = model(), applied("merge_layers_weights_only").model
    low = before.model.layers[0].self_attn.q_proj
    merged = after.model.layers[0].self_attn.q_proj
    weights = [before.model.layers[i].self_attn.q_proj.weight for i in range(3)]
    torch.testing.assert_close(merged.weight, sum(weights) / 3)
    assert torch.equal(merged.bias, low.bias) and not torch.equal(merged.weight, low.weight)


def test_a_merge_from_before_weights_only_takes_weights_only() -> None:
    """Top layer's weights between the lowest layer's biases, as the version that wrote it did."""
    low, top = (dict(model().model.layers[i].named_parameters()) for i in (0, 2))
    for name, found in applied("merge_layers").model.model.layers[0].named_parameters():
        assert torch.equal(found, (top if name.endswith("proj.weight") else low)[name]), name


def test_a_merge_without_the_field_in_a_later_plan_is_written_by_hand() -> None:
    """Plans that state the experts of their model have the field, so the default holds."""
    assert rewritten().weights_only
    assert not rewritten(before={"experts": 0}).weights_only
    assert not rewritten(weights_only=False).weights_only


def test_a_moving_average_from_before_weights_only_has_its_bits() -> None:
    """Layer by layer, as its version did; the closed form is rounded otherwise."""
    weights = [model().model.layers[i].mlp.up_proj.weight for i in range(3)]
    expected = weights[0]
    for weight in weights[1:]:
        expected = expected + 0.3 * (weight - expected)
    early = rewritten(rule="ema(0.3)")
    later = rewritten(rule="ema(0.3)", weights_only=False)
    assert torch.equal(merged(early).mlp.up_proj.weight, expected)
    found = merged(later).mlp.up_proj.weight
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected)
    with pytest.raises(PlanError, match="not from 0 to 1"):
        rewritten(rule="stepwise_ema(1.5)")


@pytest.mark.parametrize("rule", ["telescoped", "ema(0.3)"])
def test_an_early_plan_is_the_same_when_it_is_written_and_read_again(rule: str) -> None:
    """The file then says what went without saying."""
    tree = json.loads((FOLDER / "merge_layers.json").read_text())
    tree["operations"][0]["rule"] = rule
    plan = PruningPlan.parse(json.dumps(tree))
    assert PruningPlan.parse(plan.to_json()) == plan
