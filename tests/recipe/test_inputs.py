"""What a recipe reads is left alone by its output, and mistakes in `output` are told when read."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest
import yaml

from slm_plugin.comparison.configuration import Comparison
from slm_plugin.errors import RecipeError
from slm_plugin.outputs.place import Input
from slm_plugin.recipe import Recipe
from slm_plugin.recipe.inputs import inputs_of


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with a model, texts, task files and a cache."""
    work = tmp_path / "work"
    for folder in ("models/mine", "tasks", "data", "recipes"):
        (work / folder).mkdir(parents=True)
    for file in ("models/mine/config.json", "data/text.txt", "tasks/task.yaml", "data/ids.json"):
        (work / file).write_text("[[3, 4], [5, 6]]")
    monkeypatch.chdir(work)
    monkeypatch.setenv("SLM_PLUGIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    return work


def recipe(place: Path, output: str, **more: object) -> Path:
    """A recipe file that names all of it."""
    data = {
        "version": 1,
        "model": {"id": "models/mine"},
        "calibration": {"source": "data/ids.json"},
        "evaluate": [{"perplexity": {"source": "data/text.txt"}}],
        "output": output,
        **more,
    }
    file = place / "recipes" / "recipe.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("models/mine", "is the model"),
        ("./models/../models/mine/", "is the model"),
        ("models/mine/pruned", "lies inside the model"),
        ("models", "holds the model"),
        ("recipes", "holds the recipe"),
        ("recipes/recipe.yaml", "is the recipe"),
        ("data", "holds the calibration file"),
        ("data/text.txt", "is `evaluate.0.perplexity.source`"),
        ("../cache/out", "lies inside the cache of slm-plugin"),
        (".", "is the working directory"),
        ("..", "holds the working directory"),
        ("/", "root of the disk"),
        ("data/../../work", "is the working directory"),
        ("tasks", "no part of a former result: task.yaml"),
        ("   ", "no name"),
        ("~no-such-user/out", "no home folder"),
        ("a\0b", "control character"),
        ("x" * 300, "too long"),
        ("link/out", "leads nowhere"),
        ("data/ids.json/out", "cannot write into"),
    ],
)
def test_a_wrong_output_is_told_when_the_recipe_is_read(
    place: Path, output: str, said: str
) -> None:
    """In a line, with its place, for recipes and comparisons alike; nothing is made."""
    (place / "link").symlink_to("nowhere")
    before = sorted(place.rglob("*"))
    file = recipe(place, output)
    for kind in (Recipe, Comparison):
        if kind is Comparison:
            file = recipe(place, output, methods=[{"prune": "slm"}], targets=[{"ratio": 0.1}])
        with pytest.raises(RecipeError) as told:
            kind.read(file)
        lines = str(told.value).splitlines()
        assert len(lines) == 1 and ": output: " in lines[0] and said in lines[0], lines
    assert sorted(place.rglob("*")) == sorted([*before, file])


def test_an_output_beside_its_inputs_is_none_of_them(place: Path) -> None:
    """As most are: below the working directory, also with task files taken from there."""
    for output in ("out", "runs/deep/out", "models/other", "data/out", str(place / "x")):
        read = Recipe.read(recipe(place, output))
        assert read.output == Path(output)
        assert {one.what for one in read.inputs} >= {"the model", "the recipe"}
    assert not (place / "out").exists()


def test_whatever_option_holds_a_path_is_an_input(place: Path) -> None:
    """Plugins have options of their own; a folder that holds all outputs is roomy."""
    shared = ["tasks"]
    data = {
        "output": "data",
        "model": {"id": "models/mine"},
        "evaluate": [{"own": {"include_path": ".", "other": "data/text.txt", "name": "tasks"}}],
        "stages": [{"files": shared, "again": shared, "missing": "no/such", "weird": "a\0/b"}],
    }
    found = {(one.what, one.path.name, one.roomy) for one in inputs_of(data, None)}
    assert found == {
        ("the cache of slm-plugin", "cache", False),
        ("the model", "mine", False),
        ("`evaluate.0.own.include_path`", "", True),
        ("`evaluate.0.own.other`", "text.txt", False),
    }
    assert Input("x", Path("y")) == Input("x", Path("y"), roomy=False)


def test_a_bundled_alias_is_no_folder_of_that_name(place: Path) -> None:
    """The bundled model is loaded, whatever lies here."""
    (place / "smollm2-135m").mkdir()
    Recipe.read(recipe(place, "smollm2-135m/out", model={"id": "smollm2-135m"}))


@pytest.mark.parametrize("export", [["checkpoint", "checkpoint"], [{"checkpoint": {}}, "checkpoint",
                                    {"checkpoint": {"max_shard_size": "1GB"}}]])  # fmt: skip
def test_an_exporter_named_twice_is_refused(place: Path, export: list[object]) -> None:
    """Both would write one folder."""
    with pytest.raises(RecipeError, match=r"export\.1\.checkpoint: 'checkpoint' is given twice"):
        Recipe.read(recipe(place, "out", export=export))


def test_a_user_without_a_home_reads_recipes_too(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in a container."""
    import pwd

    def nobody(_: int) -> None:
        raise KeyError("uid not found")

    monkeypatch.setattr(pwd, "getpwuid", nobody)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.delenv("SLM_PLUGIN_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(tempfile, "tempdir", str(place / "data"))
    file = recipe(place, "out")
    before = sorted(place.rglob("*"))
    assert Recipe.read(file).output == Path("out")
    assert sorted(place.rglob("*")) == before
