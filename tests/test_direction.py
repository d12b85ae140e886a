"""The package imports in one direction: a module imports only from its left in ORDER."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import slm_plugin

PACKAGE = Path(slm_plugin.__file__).parent
ORDER = [
    "lazy",
    "errors",
    "control_characters",
    "texts",
    "interruption",
    "foreign",
    "counts",
    "record",
    "component",
    "target",
    "extras",
    "child",
    "files",
    "progress",
    "cache",
    "versions",
    "outputs",
    "registry",
    "models",
    "calibration",
    "plans",
    "surgery",
    "restoration",
    "evaluation",
    "export",
    "pruners",
    "recovery",
    "returned",
    "session",
    "recipe",
    "report",
    "checks",
    "preparation",
    "result",
    "pipeline",
    "comparison",
    "analysis",
    "api",
    "inspection",
    "cli",
    "__main__",
]


def imports(node: ast.AST) -> Iterator[str]:
    """Modules of this package that code imports when it runs."""
    if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
        return
    if isinstance(node, ast.ImportFrom) and node.module:
        if node.module == "slm_plugin":
            yield from (f"slm_plugin.{alias.name}" for alias in node.names)
        else:
            yield node.module
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    for child in ast.iter_child_nodes(node):
        yield from imports(child)


def part(module: str) -> str:
    """The top-level part that a module belongs to."""
    return module.split(".")[1]


@pytest.mark.parametrize("name", ORDER)
def test_a_part_knows_only_its_left(name: str) -> None:
    """No import to the right, at the top of a module or inside a function."""
    folder = PACKAGE / name
    files = list(folder.rglob("*.py")) if folder.is_dir() else [PACKAGE / f"{name}.py"]
    for file in files:
        for module in imports(ast.parse(file.read_text(encoding="utf-8"))):
            if module.startswith("slm_plugin."):
                assert ORDER.index(part(module)) <= ORDER.index(name), f"{file} imports {module}"


def test_every_part_is_in_the_order() -> None:
    """A new module or folder takes its place in the order."""
    found = {path.stem for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    assert found - {"__init__", "__pycache__", "py"} == set(ORDER)
