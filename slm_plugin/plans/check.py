"""Checks of a plan beyond the schema: indices, sizes, resulting dimensions."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from pydantic import ValidationError

from slm_plugin.errors import PlanError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.plans.earlier import as_written
from slm_plugin.plans.layout import check_even, check_fixed
from slm_plugin.plans.operations import Block, Operation, by_kind
from slm_plugin.plans.plan import PruningPlan
from slm_plugin.plans.steps import steps_of
from slm_plugin.plans.stream import stream_change
from slm_plugin.texts import first_problem, shown

# Limits on sizes, because explaining a plan builds lists of layers and of heads.
MOST = {"layers": 100_000, "attention_heads": 1 << 16, "kv_heads": 1 << 16}
_MOST_OTHERWISE = 1 << 62
# What a family may lack.
MAY_BE_ZERO = frozenset({
    "vocab_size",
    "channel_parameters",
    "kv_group_parameters",
    "query_head_parameters",
    "experts",
    "experts_per_token",
    "expert_parameters",
    "fixed_layers",
    "stream_vectors",
})  # fmt: skip
_HINT = "write plans with `slm-plugin plan` and edit only `operations`"


def parsed(text: str, origin: str) -> PruningPlan:
    """A plan that is given as JSON text; see `PruningPlan.parse`.

    Raises:
        PlanError: It is not JSON, does not fit the schema, or contradicts itself.
    """
    try:
        json.loads(text, object_pairs_hook=_once)
        # Strictly: neither "3" nor 3.0 nor true is an index.
        made = as_written(PruningPlan.model_validate_json(text, strict=True))
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
    # The units of a merged layer may be removed, so depth and width are checked apart.
    used: dict[tuple[str, Block], int] = {}
    for number, operation in enumerate(plan.operations):
        place = f"operations.{number}"
        _check_operation(place, operation, plan)
        for block in operation.used():
            key = operation.kind, block
            if key in used:
                raise PlanError(
                    f"{place}: the {block.kind} of layer {block.layer} is taken already by "
                    f"operations.{used[key]}"
                )
            used[key] = number
    # Behind the checks of indices, which may name billions of layers.
    check_fixed(by_kind(plan.operations)[0], plan.before)
    if plan.kind != "width":
        check_even(plan.before)
    if plan.kind == "hybrid":
        _check_parts(plan)
    _check_promise(plan)


def _check_sizes(place: str, sizes: Dimensions) -> None:
    for name in type(sizes).model_fields:
        size = getattr(sizes, name)
        least, most = int(name not in MAY_BE_ZERO), MOST.get(name, _MOST_OTHERWISE)
        if type(size) is int and not least <= size <= most:
            raise PlanError(f"{place}.{name}: no model has {shown(size, 24)}; {least} to {most:,}")
    widths = sizes.layer_widths
    if widths and (
        len(widths) != sizes.layers or not 0 < min(widths) < max(widths) == sizes.intermediate_size
    ):
        raise PlanError(
            f"{place}.layer_widths: {len(widths)} widths do not describe {sizes.layers} layers of "
            f"up to {sizes.intermediate_size} channels"
        )


def _check_operation(place: str, operation: Operation, plan: PruningPlan) -> None:
    if plan.kind not in (operation.kind, "hybrid"):
        raise PlanError(
            f"{place}: {operation.op} is no operation of a {plan.kind} plan",
            hint="make it two plans, one per stage, or one of kind hybrid",
        )
    try:
        operation.check(plan.before)
    except PlanError as error:
        where = f"{place}.{error.option}" if error.option else place
        raise PlanError(f"{where}: {error.message}", hint=error.hint) from error


def _check_parts(plan: PruningPlan) -> None:
    """Check that a hybrid plan has operations of both kinds, those on layers first."""
    kinds = [operation.kind for operation in plan.operations]
    for kind in ("depth", "width"):
        if kind not in kinds:
            raise PlanError(
                f"operations: a hybrid plan has depth and width operations, and there is no {kind} "
                "operation",
                hint=f"its kind is {'depth' if kind == 'width' else 'width'}",
            )
    late = next((n for n, kind in enumerate(kinds) if kind == "depth" and "width" in kinds[:n]), 0)
    if late:
        raise PlanError(
            f"operations.{late}: {plan.operations[late].op} comes after "
            f"{plan.operations[kinds.index('width')].op}",
            hint="in a hybrid plan the operations on layers come first",
        )


def _check_promise(plan: PruningPlan) -> None:
    """Check that ``after`` is the result of the operations on ``before``."""
    removed = sum(operation.layers_removed for operation in plan.operations)
    if removed >= plan.before.layers:
        raise PlanError("operations: they remove every layer of the model")
    width = by_kind(steps_of(plan)[-1].operations)[1]
    channels = {op.layer: len(op.kept) for op in width if op.unit == "channels"}
    left = plan.before.without_layers(removed)
    if channels:
        left = left.with_widths([channels.get(i, size) for i, size in enumerate(left.widths)])
    left = stream_change(plan.operations).after(left)
    # All layers keep as many of the other units as the first, which surgery checks.
    kept = {op.unit: len(op.kept) for op in reversed(width) if op.unit != "channels"}
    left = left.without_units(
        **{unit: plan.before.units[unit] - number for unit, number in kept.items()}
    )
    for name in type(left).model_fields:
        promised, found = getattr(plan.after, name), getattr(left, name)
        if promised != found:
            raise PlanError(
                f"after.{name}: promises {shown(promised)}, the operations leave {shown(found)}",
                hint="correct `after`, or cut the plan with `apply --upto`",
            )
