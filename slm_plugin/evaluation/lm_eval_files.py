"""Read the user's lm-eval task files without running their code."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import yaml

from slm_plugin.errors import UserError

LARGEST_FILE = 1 << 24


@dataclass(frozen=True, slots=True)
class FunctionName:
    """A function that a task file names by ``!function``, and that lm-eval imports.

    Attributes:
        name: The name as written, for example ``data.load``.
        folder: Folder of the task file.
    """

    name: str
    folder: Path

    @property
    def module(self) -> str:
        """The module part of the name."""
        return self.name.rpartition(".")[0]

    def source(self) -> Path | None:
        """The Python file next to the task file that lm-eval would run, if there is one."""
        file = (self.folder / f"{self.module.replace('.', '/')}.py").resolve()
        return file if file.is_file() else None


class _Loader(yaml.SafeLoader):
    """A YAML loader for plain data and ``!function``; other tags are errors."""

    folder: Path


def _function(loader: _Loader, node: yaml.Node) -> FunctionName:
    if not isinstance(node, yaml.ScalarNode):
        raise yaml.constructor.ConstructorError(
            None, None, "!function takes one name, as `!function data.load`", node.start_mark
        )
    return FunctionName(str(node.value), loader.folder)


_Loader.add_constructor("!function", _function)


def read_task_file(file: Path, root: Path, reading: tuple[Path, ...] = ()) -> dict[str, Any]:
    """A task file and what it includes, as lm-eval merges them, with functions by name.

    Args:
        file: The file.
        root: The folder of task files; included files must be inside it.
        reading: Files that include this one.

    Raises:
        UserError: A file is missing, cannot be read, is no mapping, or lies outside the folder.
    """
    path = file.resolve()
    if path in reading:
        raise UserError(f"the task file {file} includes itself")
    config = _mapping(file, path)
    merged: dict[str, Any] = {}
    listed = config.pop("include", [])
    for name in listed if isinstance(listed, list) else [listed]:
        merged.update(read_task_file(_included(file, name, root), root, (*reading, path)))
    return {**merged, **config}


def _included(file: Path, name: Any, root: Path) -> Path:
    if not isinstance(name, str):
        raise UserError(f"the task file {file}: include names files, not {name!r}")
    found = file.resolve().parent / name
    if not found.is_file():
        raise UserError(f"the task file {file} includes {name}, which is no file")
    # lm-eval's own templates may be built upon.
    if not any(found.resolve().is_relative_to(place) for place in (root.resolve(), stock_tasks())):
        raise UserError(
            f"the task file {file} includes {name}, which lies outside of {root}",
            hint="give an include_path that holds both",
        )
    return found


def _mapping(file: Path, path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > LARGEST_FILE:
            raise UserError(f"the task file {file} is too large")
        loader = _Loader(path.read_bytes())
        loader.folder = path.parent
        config = loader.get_single_data()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = "" if mark is None else f", line {mark.line + 1}"
        said = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"the task file {file}{place}: {said}") from error
    except OSError as error:
        raise UserError(f"cannot read the task file {file}: {error.strerror}") from error
    except RecursionError as error:
        raise UserError(f"the task file {file} is nested too deeply") from error
    # For example huge numbers, invalid dates, or lists as keys.
    except (ValueError, TypeError) as error:
        raise UserError(f"the task file {file}: {str(error).splitlines()[0]}") from error
    if not isinstance(config, dict):
        raise UserError(f"the task file {file} is no mapping of keys to values")
    return config


def stock_tasks() -> Path:
    """The folder of lm-eval's own tasks."""
    import lm_eval.tasks

    return Path(str(lm_eval.tasks.__file__)).resolve().parent


def function_names(value: Any) -> Iterator[FunctionName]:
    """All functions that a config names, at any depth."""
    seen: set[int] = set()
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, FunctionName):
            yield one
        elif isinstance(one, dict | list | tuple | set) and id(one) not in seen:
            # YAML aliases can make a small file a huge or cyclic tree.
            seen.add(id(one))
            waiting += [*one, *one.values()] if isinstance(one, dict) else [*one]


def check_function(wanted: FunctionName, file: Path, root: Path) -> None:
    """Check that a named function exists, without running it.

    Args:
        wanted: The function.
        file: The task file that names it.
        root: The folder of task files; the code must be inside it.

    Raises:
        UserError: There is no such file or module, it has no such name, or it lies elsewhere.
    """
    said = f"the task file {file} names the function {wanted.name}"
    if not wanted.module:
        raise UserError(f"{said}, which has no module", hint="write it as `!function data.load`")
    source = wanted.source()
    if source is None:
        origin = _installed(wanted.module)
        if origin is None:
            raise UserError(
                f"{said}, but there is no {wanted.module.replace('.', '/')}.py beside it",
                hint=f"no installed module is called {wanted.module} either",
            )
        source = origin
    elif not source.is_relative_to(root.resolve()):
        raise UserError(
            f"{said}, whose file {source} lies outside of {root}",
            hint="give an include_path that holds both",
        )
    if source.suffix == ".py" and wanted.name.rpartition(".")[2] not in _names(source):
        raise UserError(f"{said}, but {source} defines no such name")


def _installed(module: str) -> Path | None:
    """Where a module would be imported from, found without importing the packages around it."""
    places: list[str] | None = None
    spec = None
    name = ""
    for part in module.split("."):
        name = f"{name}.{part}" if name else part
        spec = _spec(name, places)
        if spec is None:
            return None
        places = list(spec.submodule_search_locations or [])
    return Path(spec.origin or "built-in") if spec is not None else None


def _spec(name: str, places: list[str] | None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        try:
            found = finder.find_spec(name, places)
        except (ImportError, ValueError, OSError):
            continue
        if found is not None:
            return found
    return None


class _Everything(set[str]):
    """The names of a module, including those it imports by ``*``."""

    def __contains__(self, name: object) -> bool:
        return True


def _names(source: Path) -> set[str]:
    """The names that a Python file defines at module level."""
    try:
        tree = ast.parse(source.read_bytes(), filename=str(source))
    except OSError as error:
        raise UserError(f"cannot read the task code {source}: {error.strerror}") from error
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UserError(f"the task code {source} is no Python: {error}") from error
    found: set[str] = set()
    waiting: list[ast.AST] = list(tree.body)
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            if any(alias.name == "*" for alias in node.names):
                return _Everything()
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        waiting += ast.iter_child_nodes(node)
    return _Everything() if "__getattr__" in found else found
