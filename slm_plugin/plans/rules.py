"""Names of merge rules, and their factors for the layers of a run.

What a rule does to the tensors of a layer is in `slm_plugin.surgery.merge_rules`.

Source: SLM (arXiv 2502.19159) and its released code; RDSC is LaCo (arXiv 2402.11187), equation 1.
"""

from __future__ import annotations

import math
import re

from slm_plugin.errors import PlanError
from slm_plugin.texts import shown

RULES = ("telescoped", "rdsc", "mean", "keep_low", "keep_high", "ema(w)", "activation", "best")
_EMA = re.compile(r"ema\(([0-9]*\.?[0-9]+)\)")
# In plans only: the same average, computed layer by layer.
_STEPWISE = re.compile(r"stepwise_" + _EMA.pattern)
_WEIGHTED = re.compile(r"weighted\((-?[0-9][0-9.]*(?:,-?[0-9][0-9.]*)*)\)")


def check_rule(rule: str) -> str:
    """Return a rule's name if there is such a rule.

    Raises:
        ValueError: There is none.
    """
    match = _EMA.fullmatch(rule)
    if match and 0 <= float(match[1]) <= 1:
        return rule
    if rule not in RULES or rule == "ema(w)":
        raise ValueError(
            f"no merge rule is called '{rule}'; rules: {', '.join(RULES)} with w from 0 to 1"
        )
    return rule


def stepwise_rule(rule: str) -> str:
    """The rule that computes a moving average layer by layer; any other rule as it is."""
    return f"stepwise_{rule}" if _EMA.fullmatch(rule) else rule


def step_of(rule: str) -> float | None:
    """The share of each next layer in a rule that is computed layer by layer; None for others."""
    match = _STEPWISE.fullmatch(rule)
    return float(match[1]) if match else None


def check_planned_rule(rule: str, layers: int) -> None:
    """Check that a rule is valid for a run of this many layers.

    Raises:
        PlanError: The rule is for another number of layers, or there is no such rule.
    """
    if rule not in ("telescoped", "keep_high", "keep_low"):
        factors(rule, layers)


def factors(rule: str, layers: int) -> tuple[list[float], float]:
    """A merged parameter as a sum over the layers, lowest first, divided by one number.

    Raises:
        PlanError: The rule is for another number of layers, or there is no such rule.
    """
    if rule == "mean":
        return [1.0] * layers, layers
    if rule == "rdsc":
        return [-(layers - 2.0)] + [1.0] * (layers - 1), 1
    if match := _EMA.fullmatch(rule) or _STEPWISE.fullmatch(rule):
        new = float(match[1])
        if new > 1:
            raise PlanError(f"the rule '{shown(rule)}' has a weight that is not from 0 to 1")
        older = [new * (1 - new) ** (layers - 1 - index) for index in range(1, layers)]
        return [(1 - new) ** (layers - 1), *older], 1
    if (match := _WEIGHTED.fullmatch(rule)) is None:
        raise PlanError(
            f"no merge rule is called '{shown(rule)}'", hint=f"rules: {', '.join(RULES)}"
        )
    try:
        parts = [float(part) for part in match[1].split(",")]
    except ValueError as error:
        raise PlanError(f"the rule '{shown(rule)}' has a weight that is no number") from error
    if len(parts) != layers:
        raise PlanError(f"the rule '{shown(rule)}' is for {len(parts)} layers, not {layers}")
    if not sum(parts) or not math.isfinite(sum(map(abs, parts))):
        raise PlanError(f"the weights of the rule '{shown(rule)}' add up to {sum(parts):g}")
    return parts, sum(parts)
