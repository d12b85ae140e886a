"""Pictures of a depth strategy's search: its trials in order, and similarity against size."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from slm_plugin.plans import PruningPlan, Trial
from slm_plugin.pruners.depth.search.runs import DROP, JOIN
from slm_plugin.report import numbers
from slm_plugin.report.pictures import canvas
from slm_plugin.report.plan_effects import final_trials, layers_left

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

_ROW = 0.165
_ACCEPTED: canvas.Look = {"facecolor": canvas.SKY, "edgecolor": canvas.BLUE, "linewidth": 0.8}
_FINAL: canvas.Look = {"facecolor": canvas.BLUE, "edgecolor": canvas.BLUE, "linewidth": 0.8}
_THRESHOLD: canvas.Look = {"color": canvas.INK, "lw": 1, "ls": (0, (4, 2)), "gid": "threshold"}
_MERGED: canvas.Look = {"color": canvas.PALE, "lw": 2.5, "solid_capstyle": "butt"}
_REJECTED: canvas.Look = {
    "facecolor": "white",
    "edgecolor": canvas.VERMILION,
    "linewidth": 0.8,
    "hatch": "/////",
}


def walk(plan: PruningPlan, name: str = "walk") -> str:
    """All trials, one per row: a bar over its layers, and its similarity.

    Args:
        plan: A depth plan.
        name: Prefix of the ids; every bar has the id ``<name>-trial-<number>``, from 1.

    Returns:
        SVG; empty when the plan has no trials.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if not plan.trials:
        return ""
    trials, final = plan.trials, final_trials(plan)
    height = len(trials) * _ROW + 1.0
    about = f"{len(trials)} trials of the {plan.pruner} walk over {plan.before.layers} layers"
    with canvas.sheet(name, height, about) as sheet:
        bars = sheet.axes(0.6, 0.45, 3.05, 0.55)
        _rows(bars, len(trials))
        for position, trial in enumerate(trials):
            look = _FINAL if position in final else _ACCEPTED if trial.accepted else _REJECTED
            for first, last in trial.committed:
                bars.plot([first - 0.4, last + 0.4], [position + 1] * 2, **_MERGED)
            width = trial.last - trial.first + 0.8
            bar = bars.barh(position + 1, width, 0.68, trial.first - 0.4, **look)
            bar[0].set_gid(f"trial-{position + 1}")
        bars.set(xlim=(-0.7, plan.before.layers - 0.3), xlabel="layer (index before the plan)")
        bars.set_ylabel("trial")
        bars.yaxis.set_label_coords(-0.07, 0.5)
        canvas.whole_numbers(bars.xaxis)
        ways = " or ".join(sorted({done(trial) for trial in trials}))
        _legend(bars, ways, bool(final), any(trial.committed for trial in trials))
        _similarity_column(sheet.axes(6.55, 0.45, 0.85, 0.55), plan, final)
    return sheet.svg


def _rows(axes: Axes, count: int) -> None:
    """One line per trial, the first on top, with sparse tick labels."""
    axes.set_ylim(count + 0.7, 0.3)
    axes.set_yticks([n for n in range(1, count + 1) if n == 1 or n % 5 == 0])
    axes.tick_params(axis="y", length=0)
    axes.grid()
    for side in ("left", "bottom"):
        axes.spines[side].set_visible(False)


def done(trial: Trial) -> str:
    """The operation of a trial in one word."""
    return {DROP: "dropped", JOIN: "joined"}.get(trial.rule or "", "merged")


def _legend(axes: Axes, done: str, final: bool, committed: bool) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    entries: list[Artist] = [
        Patch(label="rejected", **_REJECTED),
        Patch(label="accepted", **_ACCEPTED),
    ]
    if final:
        entries.append(Patch(label=f"accepted, {done} by the plan", **_FINAL))
    if committed:
        entries.append(Line2D([], [], label=f"{done} before", **_MERGED))
    axes.legend(
        handles=entries,
        loc="lower left",
        bbox_to_anchor=(-0.02, 1.0),
        ncols=len(entries),
        borderaxespad=0.3,
        handlelength=1.6,
        columnspacing=1.4,
    )


def _similarity_column(axes: Axes, plan: PruningPlan, final: set[int]) -> None:
    """Similarities beside the bars: a dot at the value and the value itself."""
    _rows(axes, len(plan.trials))
    axes.tick_params(labelleft=False)
    for position, trial in enumerate(plan.trials):
        row = position + 1
        if math.isfinite(trial.similarity):
            axes.plot(trial.similarity, row, **_marker(trial, position in final))
        axes.annotate(
            f"{trial.similarity:.4f}",
            (1.04, row),
            xycoords=("axes fraction", "data"),
            va="center_baseline",
            fontsize=8,
            color=canvas.INK if trial.accepted else canvas.MUTED,
            fontweight="bold" if position in final else "normal",
        )
    axes.set_xlim(*_limits(plan))
    axes.locator_params(axis="x", nbins=4)
    axes.set_xlabel("similarity")
    if plan.threshold is not None:
        axes.axvline(plan.threshold, **_THRESHOLD)
        axes.annotate(
            f"threshold {plan.threshold:.4g}",
            (plan.threshold, 1.0),
            xytext=(0, 4),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            ha="center",
            fontsize=8.5,
        )


def _marker(trial: Trial, final: bool) -> canvas.Look:
    if not trial.accepted:
        return {"marker": "X", "ms": 5, "color": canvas.VERMILION, "mec": "white", "mew": 0.4}
    fill = canvas.BLUE if final else canvas.SKY
    return {"marker": "o", "ms": 5, "color": fill, "mec": canvas.BLUE, "mew": 0.8}


def _limits(plan: PruningPlan) -> tuple[float, float]:
    """Similarities from the lowest to the highest, the threshold among them, with padding."""
    shown = [trial.similarity for trial in plan.trials if math.isfinite(trial.similarity)]
    shown += [plan.threshold] if plan.threshold is not None else []
    low, high = min(shown, default=0.0), max(shown, default=1.0)
    padding = 0.06 * (high - low) or 0.05
    return low - padding, high + padding


def similarities(plan: PruningPlan, name: str = "similarities") -> str:
    """Similarity of every trial against the number of remaining layers.

    Args:
        plan: A depth plan.
        name: Prefix of the ids; every point has the id ``<name>-trial-<number>``, from 1.

    Returns:
        SVG; empty when the plan has no trials.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    if not plan.trials:
        return ""
    trials, final = plan.trials, final_trials(plan)
    numbers = range(1, len(trials) + 1)
    with canvas.sheet(name, 3.6, f"Similarity of {len(trials)} trials in order") as sheet:
        top = sheet.axes(0.75, 0.35, 0.2, 1.45)
        top.plot(numbers, [trial.similarity for trial in trials], color=canvas.PALE, lw=1, zorder=1)
        if plan.threshold is not None:
            top.axhline(plan.threshold, **_THRESHOLD)
        for position, trial in enumerate(trials):
            look = _marker(trial, position in final)
            top.plot(position + 1, trial.similarity, gid=f"trial-{position + 1}", **look)
            if position in final:
                _note_window(top, position + 1, trial, leftwards=position > 0.8 * len(trials))
        top.set(ylim=_limits(plan), ylabel="similarity")
        top.margins(x=0.03)
        top.tick_params(labelbottom=False)
        top.grid(axis="y")
        low = sheet.axes(0.75, 2.35, 0.2, 0.5, below=top)
        low.step(numbers, [layers_left(plan, t) for t in trials], where="mid", color=canvas.BLUE)
        low.set(xlabel="trial", ylabel="layers left")
        for axis in (low.xaxis, low.yaxis):
            canvas.whole_numbers(axis)
        low.grid(axis="y")
        low.margins(y=0.15)
        for axes in (top, low):
            axes.yaxis.set_label_coords(-0.055, 0.5)
    return sheet.svg


def _note_window(axes: Axes, number: int, trial: Trial, *, leftwards: bool) -> None:
    axes.annotate(
        f"{done(trial)} {numbers.spans(range(trial.first, trial.last + 1))}",
        (number, trial.similarity),
        xytext=(-7 if leftwards else 7, 3),
        textcoords="offset points",
        ha="right" if leftwards else "left",
        fontsize=8.5,
        color=canvas.BLUE,
        fontweight="bold",
    )
