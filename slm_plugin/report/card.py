"""The model card: a README.md for the Hub with stages, measurements and limits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from slm_plugin.models.families import reads_tensors
from slm_plugin.plans import PruningPlan
from slm_plugin.report import before_after, markdown, table
from slm_plugin.report.environment import environment
from slm_plugin.report.record import RunReport
from slm_plugin.report.usage import recipe_yaml, snippets

# The Hub's rule for repository ids, with the owner required.
_HUB_ID = re.compile(r"(?!.*(?:--|\.\.))(?=.{3,96}$)\w[\w.-]*\b/\w[\w.-]*\b", re.ASCII)
_LICENSE_ID = re.compile(r"[a-z0-9][a-z0-9.-]*")


def render_card(report: RunReport, plans: Mapping[str, PruningPlan]) -> str:
    """The run as a model card in Markdown with YAML front matter.

    Args:
        report: The run.
        plans: The plans of the run by file, as `StageRecord.plan` names them.
    """
    # Every expression is escaped unless its type is Markdown.
    templates = environment(finalize=markdown.escape)
    templates.filters |= {"code": markdown.code, "fence": markdown.fence, "table": table.markdown}
    text = templates.get_template("model_card.md.j2").render(
        front_matter=markdown.Markdown(
            yaml.safe_dump(front_matter(report), sort_keys=False, allow_unicode=True)
        ),
        report=report,
        base=hub_id(report.model),
        summary=before_after.summary(report),
        removed=before_after.removed(report.before, report.after),
        measurements=before_after.measurement_table(report),
        sizes=before_after.size_table(report),
        exports=before_after.export_table(report),
        recovered=[stage for stage in report.stages if stage.kind == "recovery"],
        warnings=[text for _, text in before_after.warnings(report, plans)],
        plans=plans,
        snippets=snippets(report),
        recipe=markdown.fence(recipe_yaml(report), "yaml"),
    )
    return text.rstrip() + "\n"


def front_matter(report: RunReport) -> dict[str, Any]:
    """The card's metadata, with the Hub's keys."""
    kinds = dict.fromkeys(f"{s.kind}-pruning" for s in report.stages if s.kind != "recovery")
    fields: dict[str, Any] = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["pruning", *kinds, "slm-plugin"],
    }
    if reads_tensors(report.after.architecture, report.after.stack):
        # What an encoder is for depends on its head and its training.
        del fields["pipeline_tag"]
    base = hub_id(report.model)
    if base is not None:
        fields["base_model"] = base
    if report.license:
        known = _LICENSE_ID.fullmatch(report.license.lower())
        fields["license"] = known[0] if known else "other"
        if not known:
            fields["license_name"] = report.license
    return fields


def hub_id(model: str) -> str | None:
    """The model's name if it has the form ``owner/name`` and is no local folder."""
    matches = _HUB_ID.fullmatch(model) and not model.endswith((".git", ".gguf"))
    return model if matches and not Path(model).exists() else None
