"""Which families work with which methods, as Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from slm_plugin.models.families import families
from slm_plugin.models.families.family import Family
from slm_plugin.models.families.suitability import why_not
from slm_plugin.pruners.base import Pruner
from slm_plugin.registry import pruners, recoveries


def families_markdown() -> str:
    """A table of families and strategies, one of families and recoveries, and the reasons."""
    reasons: dict[str, int] = {}
    lines = []
    for title, registry in (("Strategies", pruners), ("Recoveries", recoveries)):
        names = registry.names()
        lines += [
            f"### {title}",
            "",
            f"| family | {' | '.join(names)} |",
            f"|---|{'---|' * len(names)}",
        ]
        for label, family, config in _rows():
            cells = [_cell(registry.get(name), family, config, reasons) for name in names]
            lines.append(f"| {label} | {' | '.join(cells)} |")
        lines.append("")
    lines += [f"{number}. No: {reason}." for reason, number in reasons.items()]
    return "\n".join(lines)


def _rows() -> Iterator[tuple[str, Family, Mapping[str, Any]]]:
    for family in families():
        yield _label(family), family, {}
        for name in family.parallel_if[:1]:
            other = not family.parallel_default
            label = f"`{family.model_type}` with `{name}: {str(other).lower()}`"
            yield label, family, {name: other}


def _label(family: Family) -> str:
    stack = f", {family.stack}" if family.stack else ""
    return f"`{family.model_type}`{stack}"


def _cell(cls: Any, family: Family, config: Mapping[str, Any], reasons: dict[str, int]) -> str:
    reason = why_not(cls, family, config)
    if reason:
        return f"[{reasons.setdefault(reason, len(reasons) + 1)}]"
    mixed = family.window in ("by_kind", "switched")
    merges = issubclass(cls, Pruner) and cls.merges
    return "in a kind" if merges and (mixed or family.kind_fields) else "yes"
