"""Explanation of a plan as text and tables."""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Group
from rich.text import Text

from slm_plugin.control_characters import visible
from slm_plugin.plans import DropSublayers, LayerScores, PruningPlan
from slm_plugin.plans.losses import loss_change
from slm_plugin.plans.operations import by_kind
from slm_plugin.report import before_after, numbers
from slm_plugin.report.plan_effects import (
    final_trials,
    kept_channels,
    kept_experts,
    kept_groups,
    kept_query_heads,
    layer_mapping,
)
from slm_plugin.report.table import Cell, Column, Row, Table, terminal


@dataclass(frozen=True, slots=True)
class Explanation:
    """A plan explained; prints itself on a rich console.

    Attributes:
        text: Paragraphs of plain text.
        tables: The operations on layers, and on the units inside them.
    """

    text: str
    tables: tuple[Table, ...]

    def __rich__(self) -> Group:
        return Group(Text(self.text), *map(terminal, self.tables))


def explain(plan: PruningPlan) -> Explanation:
    """Explain a plan, with a table of all operations."""
    parts = [_origin(plan), _effect(plan)]
    if plan.trials:
        parts.append(_search(plan))
    if plan.layer_scores is not None:
        parts.append(_scores(plan.layer_scores))
    for heading, lines in (("Notes", plan.notes), ("Warnings", plan.warnings)):
        if lines:
            parts.append("\n".join([f"{heading}:", *(f"  - {visible(line)}" for line in lines)]))
    made = (_frontier_table(plan), _layer_table(plan), _unit_table(plan), _expert_table(plan))
    tables = [table for table in made if table.rows]
    return Explanation("\n\n".join(parts) + "\n", tuple(tables))


def _origin(plan: PruningPlan) -> str:
    options = visible(", ".join(f"{name} {value}" for name, value in plan.options.items()))
    chosen = f" with {options}" if options else ""
    return (
        f"A {plan.kind} plan by {visible(plan.pruner)}{chosen}.\n"
        f"Made for: {visible(plan.fingerprint.architecture)}, {visible(plan.fingerprint.dtype)}, "
        f"weights {visible(plan.fingerprint.weights[:19])}; it applies to no other model.\n"
        f"Target: {visible(plan.target.describe())}."
    )


def _effect(plan: PruningPlan) -> str:
    before, after = plan.before, plan.after
    lines = [
        f"Total: {before_after.removed(before, after)}.",
        f"Layers:         {before.layers} -> {after.layers}",
        f"Parameters:     {before.parameters:,} -> {after.parameters:,} "
        f"(ratio {after.parameters / before.parameters:.3f})",
    ]
    if before.width_range != after.width_range:
        lines.append(f"MLP channels:   {before.width_range} -> {after.width_range}")
    if before.hidden_size != after.hidden_size:
        lines.append(f"Hidden size:    {before.hidden_size:,} -> {after.hidden_size:,}")
    if before.attention_heads != after.attention_heads:
        lines.append(
            f"Heads:          {before.attention_heads} -> {after.attention_heads} query, "
            f"{before.kv_heads} -> {after.kv_heads} key/value"
        )
    if before.experts != after.experts:
        lines.append(f"Experts:        {before.experts} -> {after.experts}")
    if change := loss_change(plan):
        lines.append(f"{change[0].upper()}{change[1:]}.")
    return "\n".join(lines)


def _search(plan: PruningPlan) -> str:
    accepted = sum(trial.accepted for trial in plan.trials)
    threshold = f", threshold {plan.threshold:g}" if plan.threshold is not None else ""
    values = [trial.similarity for trial in plan.trials]
    further = f" {len(plan.explored):,} other trials." if plan.explored else ""
    return (
        f"Search: {numbers.plural(len(plan.trials), 'trial')}, {accepted} accepted"
        f"{threshold}; similarities {min(values):.4f} to {max(values):.4f}.{further}"
    )


def _scores(layers: LayerScores) -> str:
    """All scores, lowest first, including those of protected layers."""
    scores = layers.scores
    order = sorted(range(len(scores)), key=scores.__getitem__)
    listed = ", ".join(f"{index} ({scores[index]:.4g})" for index in order)
    return f"Scores, lowest first, by layer: {listed}.\nA score is the {visible(layers.meaning)}."


def _frontier_table(plan: PruningPlan) -> Table:
    """The shapes among which a planner chose."""
    rows = [
        _row(
            str(shape.layers),
            shape.width_range,
            str(shape.kv_groups),
            f"{shape.cost:.1%}",
            f"{shape.predicted:.3f}",
            "" if shape.measured is None else f"{shape.measured:.3f}",
            "chosen" if shape.chosen else "",
        )
        for shape in plan.frontier
    ]
    headings = ("layers", "MLP channels", "KV groups", "cost", "predicted KL", "measured KL")
    columns = (*map(Column, headings), Column("", words=True))
    title = "Shapes that meet the target; KL to the model before in nats a token"
    return Table(columns, tuple(rows), title=title)


def _layer_table(plan: PruningPlan) -> Table:
    mapping = layer_mapping(plan)
    similarity = {
        (plan.trials[i].first, plan.trials[i].last): f"{plan.trials[i].similarity:.4f}"
        for i in final_trials(plan)
    }
    steps = iter(sorted(final_trials(plan)))
    rows = []
    for op in by_kind(plan.operations)[0]:
        layers = sorted({block.layer for block in op.used()})
        step = next(steps, None) if isinstance(op, DropSublayers) else None
        found = similarity.get((layers[0], layers[-1]), "")
        rows.append(
            _row(
                op.describe(),
                numbers.spans(layers),
                f"layer {mapping[op.merged[0]]}" if op.merged else "",
                str(op.layers_removed),
                found if step is None else f"{plan.trials[step].similarity:.4f}",
            )
        )
    headings = ("layers", "becomes", "layers removed", "similarity")
    columns = (Column("operation", words=True), *map(Column, headings))
    return Table(columns, tuple(rows), title="Layers")


def _expert_table(plan: PruningPlan) -> Table:
    rows = [
        _row(str(layer), f"{len(kept)} of {plan.before.experts}: {numbers.spans(kept)}")
        for layer, kept in sorted(kept_experts(plan).items())
    ]
    return Table(tuple(map(Column, ("layer", "experts"))), tuple(rows), title=_unit_title(plan))


def _unit_title(plan: PruningPlan) -> str:
    where = ", layers by their index before the plan" if plan.kind == "hybrid" else ""
    return f"Remaining units{where}"


def _unit_table(plan: PruningPlan) -> Table:
    channels, groups, queries = kept_channels(plan), kept_groups(plan), kept_query_heads(plan)
    before = plan.before
    rows = []
    for layer in sorted({*channels, *groups, *queries}):
        width = before.widths[layer]
        remaining = len(channels.get(layer, range(width)))
        kept = groups.get(layer, tuple(range(before.kv_heads)))
        heads = f"{len(kept) * before.queries_per_group} of {before.attention_heads}"
        if layer in queries:
            left = queries[layer]
            heads = f"{len(left)} of {before.attention_heads}: {numbers.spans(left)}"
        rows.append(
            _row(
                str(layer),
                f"{remaining:,} of {width:,}",
                f"{len(kept)} of {before.kv_heads}: {numbers.spans(kept)}",
                heads,
            )
        )
    columns = tuple(map(Column, ("layer", "MLP channels", "KV groups", "query heads")))
    return Table(columns, tuple(rows), title=_unit_title(plan))


def _row(*texts: str) -> Row:
    return Row(tuple(map(Cell, texts)))
