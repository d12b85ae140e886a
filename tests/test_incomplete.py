"""A run that fails keeps what hours of work have made, and says where."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from slm_plugin import cli, pipeline
from slm_plugin.comparison.run import compare
from slm_plugin.errors import IncompleteError, OutputError, TargetError, VerificationError
from slm_plugin.export.checkpoint import CheckpointExporter
from slm_plugin.outputs.claim import INCOMPLETE
from slm_plugin.outputs.marker import MARKER
from slm_plugin.outputs.scratch import names
from slm_plugin.plans import PruningPlan
from slm_plugin.recipe import Recipe
from tests.tiny import make_checkpoint

pytestmark = pytest.mark.usefixtures("no_matplotlib")

WEIGHTS = CheckpointExporter.export


@pytest.fixture
def recipe_file(tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two stages and a checkpoint that no process of its own reads again."""
    monkeypatch.setattr("slm_plugin.export.checkpoint.verify_checkpoint", lambda *_: ())
    model = make_checkpoint(tmp_path / "model", num_hidden_layers=5)
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"""\
version: 1
model: {{id: {model}, dtype: float32, device: cpu}}
calibration: {{source: {tokens}}}
stages:
  - prune: block_influence
    target: {{layers_removed: 1}}
  - prune: deepest
    target: {{layers_removed: 1}}
export: [checkpoint]
output: {tmp_path / "out"}
"""
    )
    return path


def fail(*_: Any, **__: Any) -> None:
    """As something that cannot be."""
    raise VerificationError("logits differ")


def test_an_export_that_fails_keeps_plans_and_report(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a checkpoint is no checkpoint; exit code 1; the former result is untouched."""
    pipeline.run(recipe_file)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    monkeypatch.setattr("slm_plugin.export.checkpoint.verify_checkpoint", fail)
    monkeypatch.setattr("sys.argv", ["slm-plugin", "run", str(recipe_file), "--overwrite"])
    with pytest.raises(SystemExit) as code:
        cli.main()
    assert code.value.code == 1
    kept = tmp_path / "out.incomplete"
    plans = ["plan-01-block_influence.json", "plan-02-deepest.json"]
    reports = ["README.md", "report.html", "report.json"]
    assert names(kept) == sorted([MARKER, INCOMPLETE, *plans, *reports])
    assert "export checkpoint failed: logits differ" in (kept / INCOMPLETE).read_text()
    assert json.loads((kept / "report.json").read_text())["exports"] == []
    assert {p: p.read_bytes() for p in before} == before
    assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_the_other_exporters_still_run(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that leaves half a folder, one that ends with a fault of its own, one that works."""
    made = []

    def export(self: CheckpointExporter, session: Any, output: Path) -> Any:
        made.append(self)
        if len(made) == 3:
            return WEIGHTS(self, session, output)
        (output / f"half-{len(made)}").mkdir()
        raise TypeError("a plugin's fault")

    recipe = Recipe.read(recipe_file)
    object.__setattr__(recipe, "exporters", recipe.exporters * 3)
    monkeypatch.setattr(CheckpointExporter, "export", export)
    with pytest.raises(IncompleteError, match="TypeError: a plugin's fault") as told:
        pipeline.run(recipe)
    assert "checkpoint" in names(told.value.kept)
    assert not [name for name in names(told.value.kept) if name.startswith("half")]


@pytest.mark.parametrize("what", ["write_report", "render"])
def test_a_report_that_fails_keeps_everything_else(
    recipe_file: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its figures, too, when only the page cannot be made."""
    target = {"write_report": "slm_plugin.pipeline.write_report",
              "render": "slm_plugin.report.writer.render_page"}[what]  # fmt: skip
    monkeypatch.setattr(target, fail)
    with pytest.raises(IncompleteError, match="the report failed: logits differ") as told:
        pipeline.run(recipe_file)
    assert {"checkpoint", "plan-01-block_influence.json"} < set(names(told.value.kept))
    assert ("report.json" in names(told.value.kept)) == (what == "render")


def test_a_stage_that_fails_keeps_the_plans_before_it(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a run with its report, and of `plan`; a plan that was kept can be used."""
    recipe = Recipe.read(recipe_file)

    def refuse(*_: Any) -> None:
        raise TargetError("out of reach")

    monkeypatch.setattr(type(recipe.stages[1]), "plan", refuse)
    with pytest.raises(IncompleteError, match="out of reach") as told:
        pipeline.run(recipe)
    assert told.value.exit_code == 1
    assert "report.json" in names(told.value.kept)
    with pytest.raises(IncompleteError, match="out of reach") as told:
        pipeline.write_plans(recipe)
    assert told.value.kept == tmp_path / "out.plans.incomplete"
    plan = PruningPlan.read(told.value.kept / "plan-01-block_influence.json")
    assert plan.layers_removed == 1
    monkeypatch.setattr(type(recipe.stages[0]), "plan", refuse)
    with pytest.raises(TargetError):
        pipeline.run(recipe)


def test_nothing_is_loaded_for_an_output_that_cannot_be(
    recipe_file: Path, tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every command that writes finds out before."""
    for module in ("slm_plugin.preparation", "slm_plugin.models.loading"):
        monkeypatch.setattr(f"{module}.load", lambda _: pytest.fail("the model was loaded"))
    plan = tmp_path / "plan.json"
    recipe = Recipe.read(recipe_file)
    plan.write_text("")
    with pytest.raises(OutputError, match="the recipe's output"):
        pipeline.write_plans(recipe, tmp_path / "out")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "photo").touch()
    (tmp_path / "out.plans").write_text("a file")
    calls = [
        lambda: pipeline.run(recipe, overwrite=True),
        lambda: pipeline.write_plans(recipe, overwrite=True),
        lambda: pipeline.write_plans(recipe, recipe_file.parent, overwrite=True),
    ]
    for call in calls:
        with pytest.raises(OutputError):
            call()
    assert names(tmp_path / "out") == ["photo"]


@pytest.mark.parametrize(
    ("output", "said"),
    [("model", "is the model"), ("model/x", "lies inside the model"), (".", "holds the"),
     ("plan.json", "is the plan")],
)  # fmt: skip
def test_apply_leaves_its_plan_and_its_model_alone(
    recipe_file: Path, tmp_path: Path, output: str, said: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Exit code 2, and nothing is gone, with --overwrite as well."""
    (made,) = pipeline.plan(Recipe.read(recipe_file, [
        "stages=[{prune: deepest, target: {layers_removed: 1}}]"])).values()  # fmt: skip
    made.write(tmp_path / "plan.json")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(
        "sys.argv",
        ["slm-plugin", "apply", str(tmp_path / "plan.json"), "--model", str(tmp_path / "model"),
         "--output", str(tmp_path / output), "--overwrite"],
    )  # fmt: skip
    with pytest.raises(SystemExit) as code:
        cli.main()
    assert code.value.code == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert sorted(tmp_path.rglob("*")) == before


def test_a_comparison_whose_page_fails_keeps_its_figures(
    recipe_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table is there already."""
    text = recipe_file.read_text().split("stages:")[0]
    text += "methods: [{prune: deepest}]\ntargets: [{layers_removed: 1}]\n"
    recipe_file.write_text(
        f"{text}evaluate: [footprint: {{tokens: 16}}]\noutput: {tmp_path / 'out'}\n"
    )
    monkeypatch.setattr("slm_plugin.comparison.page.render_comparison", fail)
    with pytest.raises(IncompleteError) as told:
        compare(recipe_file)
    assert names(told.value.kept) == [MARKER, INCOMPLETE, "comparison.json", "comparison.md"]


def test_results_have_the_permissions_of_the_umask(recipe_file: Path, tmp_path: Path) -> None:
    """Weights as well, which libraries write."""
    pipeline.run(recipe_file)
    for path in (tmp_path / "out").rglob("*"):
        assert path.stat().st_mode & 0o777 == (0o755 if path.is_dir() else 0o644), path
