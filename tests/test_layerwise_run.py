"""A recipe with ``memory: layerwise`` from beginning to end, against the same one in memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import equal
from typer.testing import CliRunner

from slm_plugin import Recipe, run
from slm_plugin.cli.commands import app
from tests.tiny import make_model, make_tokenizer, random_tokens

pytestmark = pytest.mark.usefixtures("no_matplotlib")

RECIPE = """\
version: 1
model: {{id: {folder}/model, device: cpu}}
calibration: {{source: {folder}/ids.json}}
stages:
  - prune: slm
    target: {{layers_removed: 2}}
  - prune: slm
    target: {{layers_removed: 1}}
    merge_rule: mean
evaluate:
  - footprint: {{tokens: 16}}
export:
  - checkpoint: {{}}
output: {folder}/whole
"""


def test_plans_and_weights_are_those_of_a_run_in_memory(tmp_path: Path, reload_here: None) -> None:
    """Two stages, the second on what the first left; then the plan by itself, applied."""
    make_model("qwen3", num_hidden_layers=8).save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "ids.json").write_text(json.dumps(random_tokens(6, 24).tolist()))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=tmp_path))
    whole = run(recipe)
    settings = [f"output={tmp_path / 'streamed'}", "model.memory=layerwise"]
    streamed = run(Recipe.read(recipe, settings))
    assert streamed.report.output == whole.report.output
    for name in ("plan-01-slm.json", "plan-02-slm.json"):
        assert (streamed.output / name).read_bytes() == (whole.output / name).read_bytes()
    files = [result.output / "checkpoint" / "model.safetensors" for result in (whole, streamed)]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert "no tokens were generated" in (streamed.output / "README.md").read_text()

    arguments = ["apply", str(whole.output / "plan-01-slm.json"), "--memory", "layerwise"]
    arguments += ["--model", str(tmp_path / "model"), "--output", str(tmp_path / "applied")]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    applied = load_file(tmp_path / "applied" / "checkpoint" / "model.safetensors")
    assert len({name.split(".")[2] for name in applied if ".layers." in name}) == 6
    kept = load_file(tmp_path / "model" / "model.safetensors")["model.embed_tokens.weight"]
    assert equal(applied["model.embed_tokens.weight"], kept)
