"""Plot of a depth plan's layer mapping: original layer to layer of the result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_plugin.plans import PruningPlan
from slm_plugin.report import plan_effects
from slm_plugin.report.pictures import canvas

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def layer_mapping(plan: PruningPlan, name: str = "mapping") -> str:
    """The layer mapping: original layers above, the result below, a line from each.

    Args:
        plan: A depth plan.
        name: Prefix of the ids; every original layer has one line ``<name>-layer-<layer>``.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    homes = plan_effects.layer_mapping(plan)
    below = max((home for home in homes if home is not None), default=-1) + 1
    with canvas.sheet(name, 2.3, f"{len(homes)} layers mapped to {below}") as sheet:
        axes = sheet.axes(0.75, 0.3, 0.2, 0.1)
        axes.set(xlim=(-0.6, len(homes) - 0.4), ylim=(-0.45, 1.4))
        axes.axis("off")
        shift = (len(homes) - below) / 2
        for layer, home in enumerate(homes):
            shared = homes.count(home) > 1 and home is not None
            _line(axes, layer, home, shift, shared)
            look = "dropped" if home is None else "merged" if shared else "kept"
            _box(axes, layer, 1.0, layer, look, len(homes))
        for home in range(below):
            look = "merged" if homes.count(home) > 1 else "kept"
            _box(axes, home + shift, 0.0, home, look, len(homes))
        for height, label in ((1.0, "original"), (0.0, "result")):
            axes.annotate(
                label,
                (-0.8, height),
                ha="right",
                va="center",
                color=canvas.MUTED,
                annotation_clip=False,
            )
        _legend(axes, homes)
    return sheet.svg


_BOXES: dict[str, canvas.Look] = {
    "kept": {"facecolor": "#eef2f5", "edgecolor": canvas.PALE},
    "merged": {"facecolor": canvas.BLUE, "edgecolor": canvas.BLUE},
    "dropped": {"facecolor": "white", "edgecolor": canvas.PALE, "linestyle": (0, (2, 2))},
}
# With more layers than this, boxes are too narrow for numbers.
_MOST_NUMBERED = 36
_LABELS = {"kept": canvas.INK, "merged": "white", "dropped": canvas.MUTED}


def _box(axes: Axes, x: float, y: float, label: int, look: str, layers: int) -> None:
    from matplotlib.patches import Rectangle

    axes.add_patch(Rectangle((x - 0.42, y - 0.14), 0.84, 0.28, lw=0.8, zorder=3, **_BOXES[look]))
    dense = layers > _MOST_NUMBERED
    if not dense or label % 5 == 0:
        axes.annotate(
            str(label),
            (x, y),
            ha="center",
            va="center_baseline",
            fontsize=7.5 if dense else min(9.0, 250 / layers),
            color=_LABELS[look],
            zorder=4,
        )


def _line(axes: Axes, layer: int, home: int | None, shift: float, shared: bool) -> None:
    gid = f"layer-{layer}"
    if home is None:
        axes.plot([layer, layer], [0.86, 0.62], color=canvas.MUTED, lw=1, ls=":", gid=gid)
        axes.plot(layer, 0.6, marker="x", ms=5, color=canvas.MUTED)
        return
    colour, width = (canvas.BLUE, 1.8) if shared else (canvas.PALE, 1.2)
    axes.plot([layer, home + shift], [0.86, 0.14], color=colour, lw=width, gid=gid)


def _legend(axes: Axes, homes: Sequence[int | None]) -> None:
    from matplotlib.patches import Patch

    merged = any(homes.count(home) > 1 for home in homes if home is not None)
    shown = ["kept", *(["merged"] if merged else []), *(["dropped"] if None in homes else [])]
    axes.legend(
        handles=[Patch(label=s, **_BOXES[s]) for s in shown],
        loc="lower left",
        bbox_to_anchor=(0, 0.97),
        ncols=3,
        borderaxespad=0,
        handlelength=1.2,
    )
