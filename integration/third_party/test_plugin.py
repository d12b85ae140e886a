"""The plugin of docs/plugins.md, packaged, installed beside slm_plugin and used in a recipe."""

from __future__ import annotations

import json
import re
import site
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiny import make_model

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = """\
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "my-package"
version = "1.0"
[tool.setuptools]
packages = ["my_package"]
"""


def documented(language: str) -> str:
    """The first code block of a language in docs/plugins.md."""
    text = (ROOT / "docs" / "plugins.md").read_text(encoding="utf-8")
    match = re.search(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)
    assert match is not None
    return match[1]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment that sees this one's packages, with the plugin installed in it."""
    folder = tmp_path_factory.mktemp("plugin")
    package = folder / "source" / "my_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "every_other.py").write_text(documented("python"))
    (folder / "source" / "pyproject.toml").write_text(PYPROJECT + documented("toml"))
    subprocess.run(
        [sys.executable, "-m", "venv", "--without-pip", str(folder / "venv")], check=True
    )
    python = folder / "venv" / "bin" / "python"
    (own,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (own / "host.pth").write_text(
        "\n".join(
            f"import site; site.addsitedir({p!r})" for p in [*site.getsitepackages(), str(ROOT)]
        )
    )
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps",
         "--no-build-isolation", "--disable-pip-version-check", str(folder / "source")],
        check=True,
    )  # fmt: skip
    return python


def test_the_plugin_is_listed_with_its_options(environment: Path) -> None:
    """`slm-plugin list` shows a strategy that only the entry point tells of."""
    done = subprocess.run(
        [str(environment), "-m", "slm_plugin", "list", "--json"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    assert rows["every_other"]["summary"] == "Drop every other layer from `start` upwards."
    assert [option["name"] for option in rows["every_other"]["options"]] == ["start"]


def test_a_recipe_uses_the_plugin_and_checks_its_options(environment: Path, tmp_path: Path) -> None:
    """The plugin's stage runs to a checkpoint; its misspelt option is told like any other."""
    make_model(num_hidden_layers=6).save_pretrained(tmp_path / "model")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"version: 1\nmodel: {{id: {tmp_path / 'model'}, device: cpu}}\nstages:\n"
        "  - prune: every_other\n    target: {layers_removed: 2}\n    start: 2\n"
        f"export: [checkpoint]\noutput: {tmp_path / 'out'}\n"
    )
    command = [str(environment), "-m", "slm_plugin", "run", str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    plan = json.loads((tmp_path / "out" / "plan-01-every_other.json").read_text())
    assert plan["operations"] == [{"op": "drop_layers", "indices": [2, 4]}]
    recipe.write_text(recipe.read_text().replace("start: 2", "strat: 2"))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "unknown key 'strat'; did you mean 'start'?" in done.stderr


def test_this_environment_does_not_know_the_plugin() -> None:
    """Without the package the name is unknown: nothing of it leaks into the core."""
    from slm_plugin import list_pruners

    assert "every_other" not in list_pruners()
