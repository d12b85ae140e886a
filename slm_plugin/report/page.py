"""The report as one self-contained HTML page: no script, no request to anywhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from markupsafe import Markup

from slm_plugin.errors import MissingExtraError
from slm_plugin.plans import PruningPlan
from slm_plugin.report import before_after, pictures
from slm_plugin.report.environment import environment
from slm_plugin.report.record import RunReport, StageRecord
from slm_plugin.report.usage import recipe_yaml, snippets


@dataclass(frozen=True, slots=True)
class Picture:
    """A plot with its texts; ``notice`` replaces a plot that cannot be drawn."""

    title: str
    caption: str
    svg: Markup
    notice: str = ""


_DEPTH = (
    (
        "Layer mapping",
        "Lines lead from every layer before the stage to its layer after the stage.",
        pictures.layer_mapping,
    ),
    (
        "Trials or scores",
        "A line is one trial: it spans the layers that were merged or dropped, at the height "
        "of the resulting model's similarity. A bar is the score of a layer.",
        pictures.layer_scores,
    ),
)
_WIDTH = (
    (
        "Remaining units per layer",
        "Units with the lowest scores are removed. A dot far above its bar shows that they had "
        "little part in the layer's scores.",
        pictures.widths,
    ),
)
_FRONTIER = (
    (
        "Shapes that meet the target",
        "Each with its MLP channels: the divergence KL(model before || pruned and restored model) "
        "that was predicted and, where it was measured, the one on held-out samples.",
        pictures.frontier,
    ),
)
_PICTURES = {
    "depth": (*_FRONTIER, *_DEPTH),
    "width": (*_FRONTIER, *_WIDTH),
    "hybrid": (*_FRONTIER, *_DEPTH, *_WIDTH),
}


def render_page(report: RunReport, plans: Mapping[str, PruningPlan]) -> str:
    """The whole run as an HTML page.

    Args:
        report: The run.
        plans: The plans of the run by file, as `StageRecord.plan` names them.

    Returns:
        HTML. Where matplotlib is missing, the page has a notice in place of every plot.
    """
    rows = before_after.compare(report)
    template = environment().get_template("report.html.j2")
    return template.render(
        report=report,
        summary=before_after.summary(report),
        headline=[r for r in rows if r.ratio is not None and r.name != "parameters"][:2],
        measurements=before_after.measurement_table(report),
        chart=picture(
            "Before and after",
            "Every figure that was measured by the same protocol in the first and the last "
            "state. Whiskers are one standard error.",
            pictures.before_after,
            report,
        ),
        sizes=before_after.size_table(report),
        removed=before_after.removed(report.before, report.after),
        stages=[_stage(record, plans.get(record.plan or "")) for record in report.stages],
        exports=before_after.export_table(report),
        warnings=before_after.warnings(report, plans),
        snippets=snippets(report),
        recipe=recipe_yaml(report),
    )


def _stage(record: StageRecord, plan: PruningPlan | None) -> dict[str, object]:
    """A stage with everything that the page shows about it."""
    made = [one for one in (plan, record.recovery) if one is not None]
    notes = [note for one in made for note in one.notes if note not in record.summary]
    options = made[-1].options if made else {}
    drawn = _stage_pictures(record, plan) if plan else []
    return {"record": record, "plan": plan, "options": options, "pictures": drawn, "notes": notes}


def _stage_pictures(record: StageRecord, plan: PruningPlan) -> list[Picture]:
    drawn = [
        picture(title, caption, draw, plan, f"stage-{record.number}-{draw.__name__}")
        for title, caption, draw in _PICTURES[plan.kind]
    ]
    return [one for one in drawn if one is not None]


def picture(
    title: str, caption: str, draw: Callable[..., str], *arguments: object
) -> Picture | None:
    """Draw a plot, or name the missing extra; None when there is nothing to plot."""
    try:
        svg = draw(*arguments)
    except MissingExtraError as error:
        return Picture(title, caption, Markup(""), f"{error.message}: {error.hint}")
    return Picture(title, caption, Markup(svg)) if svg else None
