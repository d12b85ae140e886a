"""The five pictures of a run, as SVG to put into a page.

A picture is empty where there is nothing to draw. ``name`` is the prefix of its ids, and
MissingExtraError is raised where matplotlib is not installed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slm_plugin.plans import LayerScores, PruningPlan
from slm_plugin.report import canvas, plan_effects
from slm_plugin.report.before_after import Comparison, compare, ordered_states
from slm_plugin.report.record import RunReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Looks = dict[str, dict[str, Any]]

_LAYERS: Looks = {
    "kept": {"facecolor": "#eef2f5", "edgecolor": canvas.PALE},
    "merged": {"facecolor": canvas.BLUE, "edgecolor": canvas.BLUE},
    "dropped": {"facecolor": "white", "edgecolor": canvas.VERMILION, "ls": ":"},
}
# With more layers than this, boxes are too narrow for numbers.
_MOST_NUMBERED = 36


def layer_mapping(plan: PruningPlan, name: str = "mapping") -> str:
    """The layer mapping of a depth plan: original layers above, the result below, a line from each.

    Every original layer has one line ``<name>-layer-<layer>``.
    """
    homes = plan_effects.layer_mapping(plan)
    sharing = Counter(home for home in homes if home is not None)
    shift = (len(homes) - len(sharing)) / 2
    with canvas.sheet(name, 2.3, f"{len(homes)} layers mapped to {len(sharing)}") as sheet:
        axes = sheet.figure.subplots()
        kinds = [_kind(home, sharing) for home in homes]
        for layer, (home, kind) in enumerate(zip(homes, kinds, strict=True)):
            gid = f"layer-{layer}"
            _box(axes, layer, 1, layer, kind, len(homes))
            if home is None:
                axes.plot([layer] * 2, [0.86, 0.6], color=canvas.VERMILION, lw=1, ls=":", gid=gid)
            else:
                colour = canvas.BLUE if kind == "merged" else canvas.PALE
                axes.plot([layer, home + shift], [0.86, 0.14], color=colour, lw=1.4, gid=gid)
        for home in sharing:
            _box(axes, home + shift, 0, home, _kind(home, sharing), len(homes))
        axes.set(xlim=(-0.6, len(homes) - 0.4), ylim=(-0.2, 1.2))
        axes.set_yticks([1, 0], ["original", "result"])
        axes.set_xticks([])
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        _legend(sheet.figure, {kind: look for kind, look in _LAYERS.items() if kind in kinds})
    return sheet.svg


def _kind(home: int | None, sharing: Counter[int]) -> str:
    return "dropped" if home is None else "merged" if sharing[home] > 1 else "kept"


def _box(axes: Axes, x: float, y: int, label: int, kind: str, layers: int) -> None:
    axes.bar(x, 0.28, 0.84, y - 0.14, zorder=3, **_LAYERS[kind])
    if layers <= _MOST_NUMBERED or label % 5 == 0:
        axes.annotate(
            str(label),
            (x, y),
            ha="center",
            va="center_baseline",
            fontsize=min(9.0, max(7.5, 250 / layers)),
            color="white" if kind == "merged" else canvas.INK,
            zorder=4,
        )


def _legend(figure: Any, patches: Looks, lines: Looks | None = None) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = [Patch(label=label, **look) for label, look in patches.items()]
    handles += [Line2D([], [], label=label, **look) for label, look in (lines or {}).items()]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))


_TRIALS: Looks = {
    "rejected": {"color": canvas.VERMILION, "lw": 1.2},
    "accepted": {"color": canvas.SKY, "lw": 2},
    "in the plan": {"color": canvas.BLUE, "lw": 3.5},
}


def layer_scores(plan: PruningPlan, name: str = "scores") -> str:
    """What a depth strategy decided by: its trials, or the score of every layer.

    A trial is a line over its layers at the height of its similarity, ``<name>-trial-<number>``
    from 1; a score is a bar, ``<name>-layer-<layer>``.
    """
    scores = plan.layer_scores
    values = [trial.similarity for trial in plan.trials] or (scores.scores if scores else ())
    if not any(map(math.isfinite, values)):
        return ""
    noun = "trials" if plan.trials else "layer scores"
    with canvas.sheet(name, 3.4, f"{len(values)} {noun} of {plan.pruner}") as sheet:
        axes = sheet.figure.subplots()
        if plan.trials:
            _trials(axes, plan)
        elif scores is not None:
            _scores(axes, plan, scores)
        axes.set(xlabel="layer (index before the plan)", xlim=(-0.7, plan.before.layers - 0.3))
        canvas.whole_numbers(axes.xaxis)
        axes.grid(axis="y")
    return sheet.svg


def _trials(axes: Axes, plan: PruningPlan) -> None:
    final = plan_effects.final_trials(plan)
    for position, trial in enumerate(plan.trials):
        kind = "accepted" if trial.accepted else "rejected"
        kind = "in the plan" if position in final else kind
        axes.plot(
            [trial.first - 0.4, trial.last + 0.4],
            [trial.similarity if math.isfinite(trial.similarity) else math.nan] * 2,
            solid_capstyle="butt",
            zorder=list(_TRIALS).index(kind) + 2,
            gid=f"trial-{position + 1}",
            **_TRIALS[kind],
        )
    lines = dict(_TRIALS)
    if plan.threshold is not None:
        look: dict[str, Any] = {"color": canvas.INK, "lw": 1, "ls": "--"}
        axes.axhline(plan.threshold, gid="threshold", **look)
        lines[f"threshold {plan.threshold:.4g}"] = look
    axes.set_ylabel("similarity")
    _legend(axes.figure, {}, lines)


def _scores(axes: Axes, plan: PruningPlan, scores: LayerScores) -> None:
    homes = plan_effects.layer_mapping(plan)
    sharing = Counter(homes)
    for layer, score in enumerate(scores.scores):
        if math.isfinite(score):
            changed = homes[layer] is None or sharing[homes[layer]] > 1
            colour = canvas.VERMILION if changed else canvas.BLUE
            axes.bar(layer, score, 0.72, color=colour)[0].set_gid(f"layer-{layer}")
    axes.set_ylabel("score")
    axes.set_title(canvas.short(scores.meaning, 110), fontweight="normal")
    looks = {"kept": {"color": canvas.BLUE}, "dropped or merged": {"color": canvas.VERMILION}}
    _legend(axes.figure, looks)


_UNITS: Looks = {
    "MLP channels": {"color": canvas.BLUE},
    "KV groups": {"color": canvas.SKY},
    "query heads": {"color": canvas.SKY},
    "experts": {"color": canvas.BLUE},
}
_DOT: dict[str, Any] = {"color": canvas.INK, "marker": "o", "ms": 4, "ls": ""}


def widths(plan: PruningPlan, name: str = "widths") -> str:
    """Share of MLP channels and heads, or of experts, that layers keep, and of their scores.

    Bars are ``<name>-<unit>-<layer>``, dots ``<name>-<unit>-score-<layer>``.
    """
    before, layers = plan.before, plan.before.layers
    heads: tuple[str, str, Sequence[int], Mapping[int, Sequence[int]]]
    heads = ("kv_group", "KV groups", (before.kv_heads,) * layers, plan_effects.kept_groups(plan))
    queries = plan_effects.kept_query_heads(plan)
    if queries:
        heads = ("query_head", "query heads", (before.attention_heads,) * layers, queries)
    units: tuple[tuple[str, str, Sequence[int], Mapping[int, Sequence[int]]], ...] = (
        ("mlp_channel", "MLP channels", before.widths, plan_effects.kept_channels(plan)),
        heads,
    )
    experts = plan_effects.kept_experts(plan)
    if experts:
        units = (("expert", "experts", (before.experts,) * layers, experts),)
    scores: dict[tuple[str, int], Sequence[float]]
    scores = {(entry.unit, entry.layer): entry.scores for entry in plan.scores}
    if not any(kept for *_, kept in units):
        return ""
    left = plan_effects.remaining_layers(plan)
    with canvas.sheet(name, 2.8, f"Units that {len(left)} layers keep") as sheet:
        axes = sheet.figure.subplots()
        for (unit, label, totals, kept), shift in zip(units, (-0.2, 0.2), strict=False):
            for layer in left:
                total = totals[layer]
                stay = kept.get(layer, range(total))
                gid, x = f"{unit}-{layer}", layer + shift
                axes.bar(x, len(stay) / total, 0.38, **_UNITS[label])[0].set_gid(gid)
                share = _share(scores.get((unit, layer), ()), stay)
                if share is not None:
                    axes.plot(x, share, gid=f"{unit}-score-{layer}", **_DOT)
        axes.set(ylim=(0, 1.05), xlim=(-0.7, layers - 0.3), xlabel="layer (index before the plan)")
        canvas.whole_numbers(axes.xaxis)
        axes.yaxis.set_major_formatter("{x:.0%}")
        axes.set_ylabel("share kept")
        axes.grid(axis="y")
        looks = {label: _UNITS[label] for _, label, _, _ in units}
        _legend(sheet.figure, looks, {"share of the scores": _DOT})
    return sheet.svg


def _share(scores: Sequence[float], kept: Iterable[int]) -> float | None:
    """Part of all scores that the kept units have; None without scores that add up."""
    total = math.fsum(scores) if all(0 <= score < math.inf for score in scores) else 0.0
    return math.fsum(scores[index] for index in kept) / total if total else None


_FRONTIER: Looks = {
    "predicted": {"color": canvas.MUTED, "marker": "o", "mfc": "white", "ms": 6, "ls": ""},
    "measured": {"color": canvas.BLUE, "marker": "o", "ms": 6, "ls": ""},
    "chosen": {"color": canvas.VERMILION, "marker": "o", "ms": 8, "ls": ""},
}


def frontier(plan: PruningPlan, name: str = "frontier") -> str:
    """The shapes among which a planner chose: how far they diverge, by the number of layers.

    Dots are ``<name>-predicted-<number>`` and ``<name>-measured-<number>``, from 1, in the order of
    the plan.
    """
    if not plan.frontier:
        return ""
    several = len({shape.kv_groups for shape in plan.frontier}) > 1
    with canvas.sheet(name, 3.0, f"{len(plan.frontier)} shapes that meet the target") as sheet:
        axes = sheet.figure.subplots()
        for number, shape in enumerate(plan.frontier, start=1):
            axes.plot(
                shape.layers, shape.predicted, gid=f"predicted-{number}", **_FRONTIER["predicted"]
            )
            if shape.measured is not None:
                look = _FRONTIER["chosen" if shape.chosen else "measured"]
                axes.plot(shape.layers, shape.measured, gid=f"measured-{number}", **look)
        # One label for all shapes of as many layers, because their dots lie close together.
        for layers in dict.fromkeys(shape.layers for shape in plan.frontier):
            shapes = [shape for shape in plan.frontier if shape.layers == layers]
            heights = [height for shape in shapes for height in (shape.predicted, shape.measured)]
            axes.annotate(
                "\n".join(
                    # Two lines, because the labels of the next numbers stand beside it.
                    shape.width_range.replace(" to ", " to\n")
                    + (f" / {shape.kv_groups}" if several else "")
                    for shape in shapes
                ),
                (layers, max(height for height in heights if height is not None)),
                xytext=(0, 7),
                textcoords="offset points",
                ha="center",
                fontsize=8,
            )
        axes.set(xlabel="layers", ylabel="KL to the model before, nats a token")
        axes.margins(x=0.08, y=0.3 if several else 0.2)
        canvas.whole_numbers(axes.xaxis)
        axes.grid(axis="y")
        _legend(sheet.figure, {}, _FRONTIER)
    return sheet.svg


def before_after(report: RunReport, name: str = "before-after") -> str:
    """A small bar chart for every figure that was measured in the first and the last state.

    Every chart has the id ``<name>-chart-<number>``, from 1.
    """
    rows = [row for row in compare(report) if row.before is not None and row.after is not None]
    if not rows:
        return ""
    labels = [canvas.short(state.label, 16) for state in ordered_states(report)]
    lines = math.ceil(len(rows) / 3)
    height = lines * (0.7 + 0.24 * len(labels))
    with canvas.sheet(name, height, f"{len(rows)} figures before and after") as sheet:
        charts = sheet.figure.subplots(lines, 3, squeeze=False).flat
        for number, axes in enumerate(charts):
            axes.axis("on" if number < len(rows) else "off")
            if number < len(rows):
                axes.set_gid(f"chart-{number + 1}")
                _chart(axes, rows[number], labels)
    return sheet.svg


def _chart(axes: Axes, row: Comparison, labels: Sequence[str]) -> None:
    """A bar for every state in which the figure was measured, the first on top."""
    bars = [(label, m) for label, m in zip(labels, row.measured, strict=True) if m is not None]
    finite = [m.value if math.isfinite(m.value) else 0.0 for _, m in bars]
    colours = [canvas.PALE, *[canvas.SKY] * (len(bars) - 2), canvas.BLUE]
    drawn = axes.barh(
        range(len(bars)),
        finite,
        0.66,
        color=colours,
        xerr=[m.stderr or 0.0 for _, m in bars],
        error_kw={"lw": 1.2, "ecolor": canvas.INK},
    )
    axes.bar_label(drawn, [row.figure(m.value) for _, m in bars], padding=4)
    axes.set_yticks(range(len(bars)), [label for label, _ in bars])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    # Room for the figure beside the longest bar.
    axes.margins(x=0.25)
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines["bottom"].set_visible(False)
    axes.set_title(f"{canvas.short(row.label, 36)}\n{row.better} is better")
