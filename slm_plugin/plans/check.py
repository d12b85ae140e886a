"""Checks of a plan beyond the schema: indices, sizes, resulting dimensions."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from slm_plugin.errors import PlanError
from slm_plugin.models.view import Dimensions
from slm_plugin.plans import (
    ConcatLayers,
    DepthOperation,
    DropLayers,
    DropSublayers,
    KeepChannels,
    KeepHeads,
    MergeLayers,
    Operation,
    PruningPlan,
)
from slm_plugin.plans.rules import check_planned_rule
from slm_plugin.texts import first_problem, shown

# Limits on sizes, because explaining a plan builds lists of layers and of heads.
MOST = {"layers": 100_000, "attention_heads": 1 << 16, "kv_heads": 1 << 16}
_MOST_OTHERWISE = 1 << 62
_HINT = "write plans with `slm-plugin plan` and edit only `operations`"


def parsed(text: str, origin: str) -> PruningPlan:
    """A plan that is given as JSON text; see `PruningPlan.parse`.

    Raises:
        PlanError: It is not JSON, does not fit the schema, or contradicts itself.
    """
    try:
        json.loads(text, object_pairs_hook=_once)
        # Strictly: neither "3" nor 3.0 nor true is an index.
        made = PruningPlan.model_validate_json(text, strict=True)
        check_plan(made)
    except PlanError as error:
        wrong, hint = error.message, error.hint or _HINT
    except ValidationError as error:
        wrong, hint = first_problem(error), _HINT
    except (ValueError, RecursionError) as error:
        place = f" at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = getattr(error, "msg", None) or "it nests too deep, or a number is too long"
        wrong, hint = f"not JSON{place}: {reason}", _HINT
    else:
        return made
    raise PlanError(f"{origin} is not a valid plan: {wrong}", hint=hint)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON whose keys are all different."""
    made = dict(pairs)
    if len(made) != len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise PlanError(f"the key '{shown(twice)}' is given twice")
    return made


def check_plan(plan: PruningPlan) -> None:
    """Check that the parts of a plan agree.

    Raises:
        PlanError: The first contradiction, with its place in the plan.
    """
    _check_sizes("before", plan.before)
    _check_sizes("after", plan.after)
    taken: dict[tuple[str, int], int] = {}
    for number, operation in enumerate(plan.operations):
        place = f"operations.{number}"
        _check_kind(place, operation, plan.kind)
        _check_operation(place, operation, plan.before)
        for unit, layer in _touched(operation):
            if (unit, layer) in taken:
                raise PlanError(
                    f"{place}: the {unit} of layer {layer} is taken already by "
                    f"operations.{taken[unit, layer]}"
                )
            taken[unit, layer] = number
    _check_promise(plan)


def _check_sizes(place: str, sizes: Dimensions) -> None:
    for name in type(sizes).model_fields:
        size = getattr(sizes, name)
        most = MOST.get(name, _MOST_OTHERWISE)
        if type(size) is int and not 1 <= size <= most:
            raise PlanError(f"{place}.{name}: no model has {shown(size, 24)}; 1 to {most:,}")


def _check_kind(place: str, operation: Operation, kind: str) -> None:
    if (kind == "depth") != isinstance(operation, DepthOperation):
        raise PlanError(
            f"{place}: {operation.op} is no operation of a {kind} plan",
            hint="make it two plans, one per stage",
        )


def _check_operation(place: str, operation: Operation, before: Dimensions) -> None:
    """Check that an operation names existing layers and units, each once."""
    if isinstance(operation, MergeLayers | ConcatLayers):
        _check_indices(place, "layer", [operation.first, operation.last], before.layers)
    if isinstance(operation, MergeLayers):
        try:
            check_planned_rule(operation.rule, operation.last - operation.first + 1)
        except PlanError as error:
            raise PlanError(f"{place}.rule: {error.message}", hint=error.hint) from error
    elif isinstance(operation, DropLayers):
        _check_indices(f"{place}.indices", "layer", operation.indices, before.layers)
    elif isinstance(operation, DropSublayers):
        _check_indices(f"{place}.attention", "layer", operation.attention, before.layers)
        _check_indices(f"{place}.mlp", "layer", operation.mlp, before.layers)
    elif isinstance(operation, KeepChannels):
        _check_indices(f"{place}.layer", "layer", [operation.layer], before.layers)
        size = before.intermediate_size
        _check_indices(f"{place}.indices", "channel", operation.indices, size)
    elif isinstance(operation, KeepHeads):
        _check_indices(f"{place}.layer", "layer", [operation.layer], before.layers)
        _check_indices(f"{place}.kv_groups", "KV group", operation.kv_groups, before.kv_heads)


def _check_indices(place: str, what: str, indices: Sequence[int], size: int) -> None:
    beyond = next((index for index in indices if index >= size), None)
    if beyond is not None:
        raise PlanError(f"{place}: names {what} {beyond}; the model has {what}s 0 to {size - 1}")
    if len(set(indices)) != len(indices):
        twice, _ = Counter(indices).most_common(1)[0]
        raise PlanError(f"{place}: names {what} {twice} twice")


def _touched(operation: Operation) -> Iterator[tuple[str, int]]:
    """The blocks or units that an operation uses, by layer."""
    if isinstance(operation, MergeLayers | ConcatLayers):
        layers: Sequence[int] = range(operation.first, operation.last + 1)
    elif isinstance(operation, DropLayers):
        layers = operation.indices
    elif isinstance(operation, DropSublayers):
        yield from (("attention", layer) for layer in operation.attention)
        yield from (("MLP", layer) for layer in operation.mlp)
        return
    else:
        yield ("MLP" if isinstance(operation, KeepChannels) else "attention"), operation.layer
        return
    for layer in layers:
        yield "attention", layer
        yield "MLP", layer


def _check_promise(plan: PruningPlan) -> None:
    """Check that ``after`` is the result of the operations on ``before``."""
    depth = [op for op in plan.operations if isinstance(op, DepthOperation)]
    removed = sum(operation.layers_removed for operation in depth)
    if removed >= plan.before.layers:
        raise PlanError("operations: they remove every layer of the model")
    channels = [op.indices for op in plan.operations if isinstance(op, KeepChannels)]
    groups = [op.kv_groups for op in plan.operations if isinstance(op, KeepHeads)]
    left = plan.before.without_layers(removed).without_units(
        channels=plan.before.intermediate_size - len(channels[0]) if channels else 0,
        kv_groups=plan.before.kv_heads - len(groups[0]) if groups else 0,
    )
    for name in type(left).model_fields:
        promised, found = getattr(plan.after, name), getattr(left, name)
        if promised != found:
            raise PlanError(
                f"after.{name}: promises {shown(promised)}, the operations leave {shown(found)}",
                hint="correct `after`, or cut the plan with `apply --upto`",
            )
