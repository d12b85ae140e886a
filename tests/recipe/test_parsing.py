"""Recipes: what is accepted, and how every mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from slm_plugin.comparison.configuration import Comparison, read_either
from slm_plugin.errors import RecipeError
from slm_plugin.extras import missing
from slm_plugin.pruners.depth.slm import SlmOptions
from slm_plugin.recipe import Recipe
from slm_plugin.recovery.closed_form.refit import RefitOptions
from tests.recipe.bad_recipes import BAD, GOOD, Bad


def test_a_good_recipe_becomes_ready_components() -> None:
    """Stages, evaluators and exporters are made in order, with their options and defaults."""
    recipe = Recipe.parse(GOOD, name="good")
    assert [stage.name for stage in recipe.stages] == ["slm", "torch_pruning"]
    assert isinstance(recipe.stages[0].options, SlmOptions)
    assert recipe.stages[0].options.protect_last == 1
    assert [evaluator.name for evaluator in recipe.evaluators] == ["perplexity"]
    assert [exporter.name for exporter in recipe.exporters] == ["checkpoint"]
    assert (recipe.name, recipe.output, recipe.seed) == ("good", Path("OUTPUT"), 1234)


def test_a_recovery_that_belongs_to_a_strategy_runs_once() -> None:
    """One that the recipe names behind it takes its place, with the options of both."""
    width = {"prune": "width", "target": {"ratio": 0.1}, "restore": "own"}
    asked = {"recover": "refit", "o_proj": True}
    recipe = Recipe.from_dict({"stages": [width, asked, width, {"recover": "fold_linear"}]})
    names = ["width", "refit", "width", "refit", "fold_linear"]
    assert [stage.name for stage in recipe.stages] == names
    first, second = recipe.stages[1].options, recipe.stages[3].options
    assert isinstance(first, RefitOptions)
    assert isinstance(second, RefitOptions)
    assert (first.toward, first.o_proj) == ("own", True)
    assert (second.toward, second.o_proj) == ("own", False)


@pytest.mark.usefixtures("no_index")
@pytest.mark.parametrize("bad", BAD, ids=lambda bad: bad.name)
def test_each_mistake_is_told_in_one_line(bad: Bad, tmp_path: Path) -> None:
    """The first line of the complaint names file, line, column, key and remedy."""
    assert bad.old in GOOD
    file = tmp_path / "recipe.yaml"
    file.write_text(GOOD.replace(bad.old, bad.new), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        Recipe.read(file)
    lines = caught.value.message.splitlines()
    expected = bad.message.replace("{file}", str(file))
    assert any(line.startswith(expected) for line in lines), "\n".join(lines)
    assert all(line.startswith(str(file)) for line in lines)
    assert caught.value.exit_code == 2


def test_all_mistakes_of_a_file_are_told_together() -> None:
    """Four mistakes in four places give four lines, in one reading."""
    text = GOOD
    for old, new in (
        ("dtype: float32", "dtype: float8"),
        ("merge_rule:", "merg_rule:"),
        ("perplexity:", "perplexty:"),
        ("checkpoint: {}", "checkpoint: {shards: 3}"),
    ):
        text = text.replace(old, new)
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    told = caught.value.message
    assert len(told.splitlines()) == 4
    for place in ("2:27", "7:5", "11:5", "13:18"):
        assert f"recipe:{place}:" in told


def test_overrides_reach_every_level() -> None:
    """--set replaces, adds and parses values as YAML."""
    recipe = Recipe.parse(
        GOOD,
        overrides=[
            "stages.0.target={ratio: 0.2}",
            "stages.1.importance=magnitude",
            "model.dtype=bfloat16",
            "output=elsewhere",
        ],
    )
    assert recipe.stages[0].target.ratio == 0.2
    assert recipe.stages[1].options.importance == "magnitude"
    assert recipe.model.dtype == "bfloat16"
    assert recipe.output == Path("elsewhere")
    assert recipe.data["output"] == "elsewhere"


def test_mistakes_of_an_override_name_it_and_no_line_of_the_file() -> None:
    """The line would show a value that is right; what the file says itself keeps its place."""
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(
            GOOD, origin="r.yaml", overrides=["stages.0.target.ratio=7", "model={id: x, dtpye: y}"]
        )
    told = str(caught.value).splitlines()
    assert any(line.startswith("--set stages.0.target.ratio=7: stages.0.target") for line in told)
    assert any(line.startswith("--set model={id: x, dtpye: y}: model.dtpye: ") for line in told)
    assert not any(line.startswith("r.yaml") for line in told)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["seed=3", "calibration=#none"], "--set calibration=#none: stages.0: 'slm' needs calib"),
        (["stages.0.target.ratio=0.5"], "--set stages.0.target.ratio=0.5: stages.0.target: give"),
        (["stages.0.compatibility=released", "seed=3"], "--set stages.0.compatibility=released: "),
        (["seed=3", "stages.1.target.ratio=0.9", "stages.0.target={ratio: 0.2}"],
         "--set stages.0.target={ratio: 0.2}: stages: the ratios add up"),
    ],
)  # fmt: skip
def test_a_mistake_that_an_override_makes_elsewhere_is_told_as_its_own(
    settings: list[str], told: str
) -> None:
    """The file alone has no such mistake: its line would show what is right there."""
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(GOOD, origin="r.yaml", overrides=settings)
    assert str(caught.value).startswith(told)
    assert "r.yaml" not in str(caught.value)


def test_a_mistake_of_the_file_stays_the_files_beside_an_override() -> None:
    """Whatever is overridden elsewhere."""
    text = GOOD.replace("float32", "float8")
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text, origin="r.yaml", overrides=["seed=3", "stages.0.target.ratio=0.5"])
    first, second = str(caught.value).splitlines()
    assert first.startswith("r.yaml:2:27: model.dtype: ")
    assert second.startswith("--set stages.0.target.ratio=0.5: stages.0.target: ")


def test_one_mistake_is_told_in_one_line_where_entries_are_wrong() -> None:
    """No second line says that the list is empty, or what pydantic's forms are called."""
    for change in ("lm_eval: {tasks: [3]}", "4"):
        text = GOOD.replace("perplexity: {source: builtin, length: 64}", change)
        with pytest.raises(RecipeError) as caught:
            Recipe.parse(text)
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("ending", "problem"),
    [("}}]", "evaluate.0.perplexity.lenght: "), ("}", "the value is not YAML")],
)
def test_a_long_override_is_named_in_one_short_line(ending: str, problem: str) -> None:
    """A value may be given in many lines; the message stays one."""
    value = "[{perplexity: {source: builtin,\n  length: 128,\n  limit: 4, lenght: 64" + ending
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(GOOD, origin="r.yaml", overrides=["evaluate=" + value])
    (told,) = str(caught.value).splitlines()
    start = "--set evaluate=[{perplexity: {source: builtin, length: 128, limit: 4, "
    named, _, rest = told.partition("…: ")
    assert named == start + "lenght:"
    assert rest.startswith(problem)


@pytest.mark.parametrize(
    ("setting", "words"),
    [
        ("stages.7.target.ratio=0.2", "has no '7' there"),
        ("output", "not of the form"),
        ("=3", "not of the form"),
        ("seed=[", "is not YAML"),
        ("stages.0.target.ratio=0.2", "give exactly one of"),
        ("version.x.y=1", "should be 1"),
    ],
)
def test_bad_overrides_are_told(setting: str, words: str) -> None:
    """An override that leads nowhere or breaks the recipe is one line too."""
    with pytest.raises(RecipeError, match=words):
        Recipe.parse(GOOD, overrides=[setting])


def test_a_bare_name_is_an_entry_without_options() -> None:
    """``- checkpoint`` means ``- checkpoint: {}``, and null options mean none."""
    text = GOOD.replace("- checkpoint: {}", "- checkpoint").replace(
        "- perplexity: {source: builtin, length: 64}", "- perplexity:"
    )
    recipe = Recipe.parse(text)
    assert [exporter.name for exporter in recipe.exporters] == ["checkpoint"]
    assert [evaluator.name for evaluator in recipe.evaluators] == ["perplexity"]


def test_a_recipe_that_reads_only_weights_needs_no_calibration() -> None:
    """Magnitude importance runs without a calibration section."""
    text = GOOD.replace("calibration: {source: builtin, samples: 4, length: 32}\n", "")
    text = text.replace(
        "prune: slm\n    target: {layers_removed: 2}\n    merge_rule: telescoped",
        "prune: torch_pruning\n    target: {ratio: 0.1}\n    importance: magnitude",
    )
    text = text.replace("  - prune: torch_pruning\n    target: {ratio: 0.1}\nevaluate", "evaluate")
    assert Recipe.parse(text).calibration is None


DROPPING = """\
version: 1
model: {id: smollm2-135m}
calibration: {source: builtin, samples: 4, length: 32}
stages:
  - {prune: block_influence, target: {layers_removed: 2}, protect_last: 1}
  - {prune: angular, target: {ratio: 0.1}, protect_first: 2}
  - {prune: deepest, target: {parameters: 100M}}
  - {prune: sleb, target: {layers_removed: 2}, criterion: logit_kl}
  - {prune: shortened, target: {layers_removed: 2}, score: taylor, keep_list: false}
  - {prune: streamline, target: {ratio: 0.1}, protect_last: 1}
  - {prune: shapley, target: {layers_removed: 2}, samples: 500}
output: OUTPUT
"""


def test_strategies_that_drop_layers_are_known() -> None:
    """Each with every kind of target but a threshold, and its own options."""
    stages = Recipe.parse(DROPPING).stages
    names = ["block_influence", "angular", "deepest", "sleb", "shortened", "streamline", "shapley"]
    assert [stage.name for stage in stages] == names
    assert stages[3].options.protect_first == stages[3].options.protect_last == 1
    assert [stage.needs_calibration for stage in stages] == [
        True,
        True,
        False,
        True,
        True,
        True,
        True,
    ]
    with pytest.raises(RecipeError, match="sleb takes no target of kind 'threshold'"):
        Recipe.parse(DROPPING, overrides=["stages.3.target={threshold: 0.5}"])
    with pytest.raises(RecipeError, match="did you mean 'keep_list'"):
        Recipe.parse(DROPPING.replace("keep_list", "keeplist"))


def test_layerwise_takes_dropping_but_for_gradients() -> None:
    """All strategies that only run layers stream; `shortened` reads weights and does not."""
    layerwise = DROPPING.replace("smollm2-135m", "smollm2-135m, memory: layerwise")
    with pytest.raises(RecipeError, match=r"stages\.4: 'shortened' needs") as caught:
        Recipe.parse(layerwise)
    assert len(caught.value.message.splitlines()) == 1


@pytest.mark.parametrize("score", ["deepest", "shortened"])
def test_dropping_by_weights_or_depth_needs_no_calibration(score: str) -> None:
    """Deepest reads nothing, magnitude only the weights."""
    stage = "{prune: deepest, target: {layers_removed: 1}}"
    if score == "shortened":
        stage = "{prune: shortened, target: {layers_removed: 1}, score: magnitude}"
    text = f"version: 1\nmodel: {{id: smollm2-135m}}\nstages:\n  - {stage}\noutput: OUTPUT\n"
    assert Recipe.parse(text).calibration is None


def test_missing_extras_are_told_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stage whose packages are not installed is refused with the install command."""
    from slm_plugin import extras

    found = extras.found_version
    monkeypatch.setattr(
        extras, "found_version", lambda name: None if name == "torch-pruning" else found(name)
    )
    with pytest.raises(RecipeError, match=r"stages.1.prune: .*slm-plugin\[width\]"):
        Recipe.parse(GOOD)


def test_an_unreadable_file_is_one_line(tmp_path: Path) -> None:
    """A recipe that is not there, is a folder or is not text says so."""
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01")
    for path in (tmp_path / "none.yaml", tmp_path, tmp_path / "binary.yaml"):
        with pytest.raises(RecipeError, match="cannot read the recipe"):
            Recipe.read(path)


def test_every_shipped_recipe_is_valid() -> None:
    """The recipes and comparisons of this repository pass their own check."""
    folder = Path(__file__).resolve().parents[2] / "recipes"
    recipes = sorted(folder.glob("*.yaml"))
    assert len(recipes) >= 4
    for recipe in recipes:
        try:
            read = read_either(recipe)
            assert read.methods if isinstance(read, Comparison) else read.stages
        except RecipeError as error:
            # Optimum does not live beside transformers 5; nothing else may be wrong there.
            assert missing("onnx")
            assert all("slm-plugin[onnx]" in line for line in error.message.splitlines())


def test_layerwise_refuses_what_needs_the_whole_model() -> None:
    """Width, recovery, latency and text of the model's own: one line each, at their places."""
    text = GOOD.replace("dtype: float32", "memory: layerwise").replace(
        "builtin, samples", "self, samples"
    )
    text = text.replace(
        "- perplexity: {source: builtin, length: 64}", "- perplexity\n  - latency: {}"
    )
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text)
    told = caught.value.message.splitlines()
    assert [line.split(": ")[0:2] for line in told] == [
        ["recipe:8:5", "stages.1"],
        ["recipe:12:5", "evaluate.1.latency"],
        ["recipe:3:15", "calibration.source"],
    ]
    assert all("model.memory is layerwise" in line for line in told)


def test_layerwise_takes_depth_perplexity_and_checkpoints() -> None:
    """Nothing is refused that streams; an override reaches the key."""
    text = GOOD.replace("  - prune: torch_pruning\n    target: {ratio: 0.1}\n", "")
    assert Recipe.parse(text, overrides=["model.memory=layerwise"]).model.memory == "layerwise"


def test_layerwise_refuses_gguf_where_it_is_asked_for() -> None:
    """The complaint points at the key, not at the file's name."""
    text = GOOD.replace("id: smollm2-135m, dtype: float32", "id: a.gguf, memory: layerwise")
    with pytest.raises(
        RecipeError, match=r"recipe:2:21: model.memory: layerwise reads safetensors"
    ):
        Recipe.parse(text)
