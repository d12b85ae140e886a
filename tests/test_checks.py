"""Targets of several stages, checked before the first of them runs."""

from __future__ import annotations

from pathlib import Path

import pytest

from slm_plugin.checks import refuse_targets
from slm_plugin.errors import RecipeError, TargetError
from slm_plugin.recipe import Recipe
from tests.tiny import SMOLLM2, make_checkpoint

STAGES = """\
version: 1
model: {{id: {model}, device: cpu}}
calibration: {{source: builtin, samples: 4, length: 32}}
stages:
{stages}
output: OUTPUT
"""


def recipe(*stages: str, model: str = "a/b") -> Recipe:
    """A recipe with these stages."""
    listed = "\n".join(f"  - {{{stage}}}" for stage in stages)
    return Recipe.parse(STAGES.format(model=model, stages=listed))


def test_stages_that_together_leave_no_layer_are_refused_when_read(tmp_path: Path) -> None:
    """Where the model's folder, or its name, tells how many layers it has."""
    six = str(make_checkpoint(tmp_path / "m"))
    taking = "prune: deepest, target: {layers_removed: 3}"
    assert len(recipe(taking, model=six).stages) == 1
    with pytest.raises(RecipeError, match=r"7:\d+: stages\.2\.target: .* remove 6 layers"):
        recipe(taking, "recover: refit", taking, model=six)
    with pytest.raises(RecipeError, match=r"stages\.0\.target: .* remove 30 layers"):
        recipe("prune: deepest, target: {layers_removed: 30}", model="smollm2-135m")


def test_a_broken_config_is_no_matter_of_the_recipe(tmp_path: Path) -> None:
    """What is wrong with a model is told when it is loaded."""
    for content in ("{", "[]", '{"num_hidden_layers": true}', "[" * 100_000, "9" * 5000):
        (tmp_path / "config.json").write_text(content)
        assert recipe("prune: deepest, target: {layers_removed: 30}", model=str(tmp_path))


def test_a_later_stage_is_measured_on_what_the_earlier_ones_leave() -> None:
    """With its place in the file, and with what it finds there."""
    stages = recipe(
        "prune: deepest, target: {layers_removed: 20}",
        "recover: refit",
        "prune: deepest, target: {ratio: 0.4}",
    ).stages
    with pytest.raises(TargetError, match=r"stages\.2 \(deepest\): .* after the earlier stages"):
        refuse_targets(stages, SMOLLM2)
    refuse_targets(stages[:2], SMOLLM2)


def test_a_threshold_may_leave_anything() -> None:
    """How many layers it takes is known when it is planned."""
    stages = recipe(
        "prune: slm, target: {threshold: 0.5}", "prune: deepest, target: {layers_removed: 29}"
    ).stages
    refuse_targets(stages, SMOLLM2)
