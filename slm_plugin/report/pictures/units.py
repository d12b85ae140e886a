"""Plots of a width plan: the remaining units of every layer, and the scores."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING

from slm_plugin.plans import PruningPlan
from slm_plugin.report.pictures import canvas
from slm_plugin.report.plan_effects import kept_channels, kept_groups

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_KEPT: canvas.Look = {"color": canvas.BLUE}
_REMOVED: canvas.Look = {
    "facecolor": "white",
    "edgecolor": canvas.VERMILION,
    "linewidth": 0.6,
    "hatch": "//////",
}
# Inches above a panel, for its title.
_GAP = 0.5
# With more KV groups than this, a bar per layer is drawn instead of a cell per group.
_MOST_CELLS = 32


@dataclass(frozen=True, slots=True)
class Spread:
    """Lowest, median and highest score of some units."""

    low: float
    middle: float
    high: float


def spread(scores: Sequence[float]) -> Spread | None:
    """The three figures of some scores; None when there are no finite ones."""
    finite = [score for score in scores if math.isfinite(score)]
    return Spread(min(finite), median(finite), max(finite)) if finite else None


def widths(plan: PruningPlan, name: str = "widths") -> str:
    """MLP channels and KV groups that every layer keeps, and the scores of kept and removed ones.

    Args:
        plan: A width plan.
        name: Prefix of the ids; the bar of a layer's kept channels has the id
            ``<name>-channels-<layer>``, the cell of a KV group ``<name>-group-<layer>-<group>``.

    Returns:
        SVG; empty when the plan keeps everything.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    panels = _panels(plan)
    if not panels:
        return ""
    height = 0.65 + sum(panel + _GAP for panel, _ in panels)
    about = f"Units that {plan.before.layers} layers keep, and their scores"
    with canvas.sheet(name, height, about) as sheet:
        top, axes = _GAP, None
        for panel, draw in panels:
            axes = sheet.axes(0.8, top, 0.2, height - top - panel, below=axes)
            draw(axes)
            if top == _GAP:
                _key(axes)
            axes.set_xlim(-0.7, plan.before.layers - 0.3)
            canvas.whole_numbers(axes.xaxis)
            top += panel + _GAP
        if axes is not None:
            axes.set_xlabel("layer")
    return sheet.svg


def _panels(plan: PruningPlan) -> list[tuple[float, Callable[[Axes], None]]]:
    """Height in inches and drawing function of every panel with content."""
    channels, groups = kept_channels(plan), kept_groups(plan)
    panels: list[tuple[float, Callable[[Axes], None]]] = []
    if channels:
        panels.append((1.25, partial(_channel_bars, plan=plan, kept=channels)))
        if _scored(plan, "mlp_channel"):
            panels.append((1.6, partial(_scores, plan=plan, unit="mlp_channel", kept=channels)))
    if groups:
        height = min(0.24 * plan.before.kv_heads, 2.4)
        panels.append((height, partial(_group_cells, plan=plan, kept=groups)))
        if _scored(plan, "kv_group"):
            panels.append((1.6, partial(_scores, plan=plan, unit="kv_group", kept=groups)))
    return panels


def _scored(plan: PruningPlan, unit: str) -> bool:
    return any(scores.unit == unit for scores in plan.scores)


def _channel_bars(axes: Axes, plan: PruningPlan, kept: Mapping[int, Sequence[int]]) -> None:
    total = plan.before.intermediate_size
    for layer in range(plan.before.layers):
        stay = len(kept.get(layer, range(total)))
        axes.bar(layer, stay, 0.78, **_KEPT)[0].set_gid(f"channels-{layer}")
        if stay < total:
            axes.bar(layer, total - stay, 0.78, bottom=stay, **_REMOVED)
    axes.set(ylim=(0, total * 1.02), ylabel="channels")
    axes.set_title("MLP channels per layer")
    _plain(axes)


def _group_cells(axes: Axes, plan: PruningPlan, kept: Mapping[int, Sequence[int]]) -> None:
    """A cell per KV group, because layers may keep different groups of the same number."""
    total = plan.before.kv_heads
    for layer in range(plan.before.layers):
        stay = set(kept.get(layer, range(total)))
        if total > _MOST_CELLS:
            axes.bar(layer, len(stay), 0.78, **_KEPT)[0].set_gid(f"groups-{layer}")
            continue
        for group in range(total):
            look = _KEPT if group in stay else _REMOVED
            cell = axes.bar(layer, 0.78, 0.78, bottom=group - 0.39, **look)
            cell[0].set_gid(f"group-{layer}-{group}")
    axes.set(ylim=(-0.6, total - 0.4), ylabel="KV group")
    axes.set_title("KV groups (key/value heads with their query heads)")
    canvas.whole_numbers(axes.yaxis)
    _plain(axes)
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)


def _scores(axes: Axes, plan: PruningPlan, unit: str, kept: Mapping[int, Sequence[int]]) -> None:
    """Range and median of the scores of kept units, and beside it of the removed ones."""
    shown: list[float] = []
    for entry in plan.scores:
        if entry.unit != unit:
            continue
        stay = set(kept.get(entry.layer, range(len(entry.scores))))
        parts: tuple[list[float], list[float]] = ([], [])
        for index, score in enumerate(entry.scores):
            parts[index not in stay].append(score)
        for part, shift, colour, marker in (
            (parts[0], -0.17, canvas.BLUE, "o"),
            (parts[1], 0.17, canvas.VERMILION, "X"),
        ):
            found = spread(part)
            if found is not None:
                shown += [found.low, found.high]
                x = entry.layer + shift
                axes.plot([x, x], [found.low, found.high], color=colour, lw=1.6, alpha=0.55)
                axes.plot(
                    x, found.middle, marker=marker, ms=4.5, color=colour, mec="white", mew=0.4
                )
    if shown and min(shown) > 0 and max(shown) > 100 * min(shown):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_ylabel("score")
    noun = "MLP channels" if unit == "mlp_channel" else "KV groups"
    axes.set_title(f"Scores of {noun}: lowest, median and highest of a layer")
    axes.grid(axis="y")
    _plain(axes)


def _plain(axes: Axes) -> None:
    axes.yaxis.set_label_coords(-0.06, 0.5)
    axes.tick_params(axis="x", length=0)
    axes.spines["bottom"].set_visible(False)


def _key(axes: Axes) -> None:
    from matplotlib.patches import Patch

    axes.legend(
        handles=[Patch(label="kept", **_KEPT), Patch(label="removed", **_REMOVED)],
        loc="lower right",
        bbox_to_anchor=(1.0, 0.99),
        ncols=2,
        borderaxespad=0,
        handlelength=1.4,
    )
