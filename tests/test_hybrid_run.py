"""A strategy of somebody else's whose plan has two parts, from the recipe to the report."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest

pytest.importorskip("torch_pruning")

from slm_plugin import PruningPlan, Session, Target, register_pruner
from slm_plugin.inspection import components
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.plans import DropLayers, KeepChannels
from slm_plugin.pruners.base import Pruner
from slm_plugin.registry import pruners
from slm_plugin.report.families import families_markdown
from tests.tiny import command, make_checkpoint, make_model, random_tokens

pytestmark = pytest.mark.usefixtures("no_matplotlib")
LEFT = (0, 2, 3, 5)


@pytest.fixture(autouse=True)
def halves() -> Iterator[None]:
    """The strategy, for one test."""

    class Halves(Pruner):
        """Drops two layers of six and half of the channels of the others."""

        kind: ClassVar = "hybrid"
        targets: ClassVar = ("ratio", "layers_removed")

        def plan(self, session: Session) -> PruningPlan:
            before = session.view.dimensions()
            kept = tuple(range(before.intermediate_size // 2))
            narrower = before.without_layers(2).without_units(channels=len(kept))
            return PruningPlan(
                pruner="halves",
                kind="hybrid",
                target=self.target,
                fingerprint=session.fingerprint(),
                before=before,
                after=narrower,
                operations=(
                    DropLayers(indices=(4,)),
                    DropLayers(indices=(1,)),
                    *(KeepChannels(layer=layer, indices=kept) for layer in LEFT),
                ),
            )

    register_pruner("halves")(Halves)
    yield
    del pruners._classes["halves"]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tiny Llama of six layers."""
    return make_checkpoint(tmp_path / "model")


def test_a_run_reports_both_parts(
    tmp_path: Path, checkpoint: Path, tokens: Path, reload_here: None
) -> None:
    """The plan, the log, the page and the card; a repair follows; the checkpoint has both sizes."""
    out, file = tmp_path / "out", tmp_path / "recipe.yaml"
    recipe = {
        "version": 1,
        "model": {"id": str(checkpoint), "device": "cpu"},
        "calibration": {"source": str(tokens)},
        "stages": [{"prune": "halves", "target": {"layers_removed": 2}}, {"recover": "refit"}],
        "export": ["checkpoint"],
        "output": str(out),
    }
    file.write_text(json.dumps(recipe))
    ran = command("run", str(file))
    assert ran.returncode == 0, ran.stderr
    assert "6 to 4 layers, MLP channels 48 -> 24, " in ran.stderr
    plan = PruningPlan.read(out / "plan-01-halves.json")
    assert plan.kind == "hybrid" and plan.loss_before and plan.loss_after
    figures = f"calibration loss {plan.loss_before:.3f} -> {plan.loss_after:.3f} nats a token"
    page, card = (out / "report.html").read_text(), (out / "README.md").read_text()
    for text in (ran.stderr, page, card):
        assert figures in text.replace("-&gt;", "->").replace("-\\>", "->")
    assert "Layer mapping" in page and "Remaining units per layer" in page
    assert "- hybrid-pruning" in card
    (stage, recovery) = json.loads((out / "report.json").read_text())["stages"]
    assert (stage["kind"], recovery["kind"]) == ("hybrid", "recovery")
    config = json.loads((out / "checkpoint" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (4, 24)


def test_its_plan_is_explained_and_applied(
    tmp_path: Path, checkpoint: Path, reload_here: None
) -> None:
    """Whole, or cut within the layers; in one line where it cannot be cut."""
    plan = str(tmp_path / "plan.json")
    model, _ = load(ModelSource(id=str(checkpoint), device="cpu"))
    halves = pruners.get("halves")
    session = Session(model, calibration=random_tokens())
    session.plan(halves(halves.Options(), Target(layers_removed=2))).write(plan)
    told = command("explain", plan)
    assert told.returncode == 0 and "A hybrid plan by halves." in told.stdout
    assert "Remaining units" in told.stdout and "6 -> 4" in told.stdout
    for count, layers, channels in (("1", 5, 48), ("6", 4, 24)):
        output = tmp_path / f"applied-{count}"
        asked = ("apply", plan, "--model", str(checkpoint), "--output")
        ran = command(*asked, str(output), "--upto", count)
        assert ran.returncode == 0, ran.stderr
        config = json.loads((output / "checkpoint" / "config.json").read_text())
        assert (config["num_hidden_layers"], config["intermediate_size"]) == (layers, channels)
    refused = command(*asked, str(tmp_path / "other"), "--upto", "3")
    assert refused.returncode == 2
    error, hint = refused.stderr.strip().splitlines()
    assert error.startswith("error: a hybrid plan cannot be cut after operation 3: ")
    assert hint == "hint: give at most 2, or 6 for all operations"


def test_it_is_listed() -> None:
    """With the components, and in the table of families."""
    (row,) = (one for one in components() if one["name"] == "halves")
    assert row["kind"] == "pruner" and row["ready"]
    assert "halves" in families_markdown()


def test_a_size_is_missed_by_more_than_half_a_step() -> None:
    """The step is that of width, which a hybrid plan can take."""
    session = Session(make_model(), calibration=random_tokens())
    cls = pruners.get("halves")
    plan = session.plan(cls(cls.Options(), Target(ratio=0.1)))
    assert any(text.startswith("target missed: 10.0%") for text in plan.warnings)
    removed = plan.parameters_removed / session.original.parameters
    plan = session.plan(cls(cls.Options(), Target(ratio=round(removed, 4))))
    assert not any(text.startswith("target missed") for text in plan.warnings)
