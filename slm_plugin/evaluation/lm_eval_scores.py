"""Convert lm-eval's results to measurements."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from slm_plugin.evaluation.base import Measurement

HEADLINE = ("acc", "acc_norm")


def scores(results: Mapping[str, Any], names: Sequence[str]) -> list[Measurement]:
    """Scores of the requested tasks and groups.

    A group with aggregates is one entry; otherwise its members are listed. A task gives ``acc`` and
    ``acc_norm`` if it has one of them, else every metric that it has.

    Args:
        results: In the form that ``lm_eval.simple_evaluate`` returns.
        names: Tasks and groups, in the order of the recipe.
    """
    return [
        measurement
        for name in names
        for reported in _reported(results, name)
        for measurement in _of(results, reported)
    ]


def _reported(results: Mapping[str, Any], name: str) -> Iterator[str]:
    members = results["group_subtasks"].get(name)
    if members is None or name in results.get("groups", {}):
        yield name
        return
    for member in members:
        yield from _reported(results, member)


def _of(results: Mapping[str, Any], name: str) -> Iterator[Measurement]:
    found = _metrics(results["results"][name])
    headline = {key: value for key, value in found.items() if key[0] in HEADLINE}
    directions = results["higher_is_better"].get(name, {})
    for (metric, filtered), (value, stderr) in (headline or found).items():
        yield Measurement(
            name=" ".join((name, metric, *([filtered] if filtered != "none" else []))),
            value=value,
            stderr=stderr,
            protocol=_protocol(results, name),
            better="lower" if directions.get(metric) is False else "higher",
        )


def _metrics(row: Mapping[str, Any]) -> dict[tuple[str, str], tuple[float, float | None]]:
    """Value and standard error by metric and filter, from keys as ``acc_stderr,none``."""
    found = {}
    for key, value in row.items():
        metric, comma, filtered = key.partition(",")
        if comma and not metric.endswith("_stderr") and isinstance(value, int | float):
            error = row.get(f"{metric}_stderr,{filtered}")
            stderr = float(error) if isinstance(error, int | float) else None
            found[metric, filtered] = (float(value), stderr)
    return found


def _protocol(results: Mapping[str, Any], name: str) -> str:
    leaves = list(_leaves(results, name))
    counts = [results["n-samples"][leaf] for leaf in leaves]
    used, existing = (sum(count[key] for count in counts) for key in ("effective", "original"))
    shots = "/".join(str(n) for n in sorted({results["n-shot"][leaf] for leaf in leaves}))
    details = [
        f"lm-eval {results['lm_eval_version']}",
        f"task version {results['versions'].get(name)}",
        f"{shots}-shot",
        f"all {used} documents" if used == existing else f"{used} of {existing} documents",
    ]
    if shots != "0":
        details.append(f"few-shot seed {results['config']['fewshot_seed']}")
    if name in results["group_subtasks"]:
        details.append(f"aggregate of {len(leaves)} tasks")
    limit = results["config"]["limit"]
    if limit is not None:
        details.append(f"first {limit} of each task")
    return ", ".join(details)


def _leaves(results: Mapping[str, Any], name: str) -> Iterator[str]:
    members = results["group_subtasks"].get(name)
    if members is None:
        yield name
        return
    for member in members:
        yield from _leaves(results, member)
