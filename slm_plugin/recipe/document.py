"""A recipe as a YAML document: data, the place of every value, overrides, mistakes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from slm_plugin.errors import RecipeError

Place = tuple[str | int, ...]
T = TypeVar("T")
# Characters of an override that messages show: enough to tell which one it is.
SHOWN = 72


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a recipe: where it is and what is wrong."""

    path: Place
    message: str


@dataclass(frozen=True, slots=True)
class Located:
    """A YAML document as plain data, with line and column (from 1) of every key and item.

    ``overridden`` holds the setting of each place that is not as the file has it.
    """

    data: Any
    places: dict[Place, tuple[int, int]]
    problems: tuple[Problem, ...]
    overridden: dict[Place, str] = field(default_factory=dict)

    def place(self, path: Place) -> tuple[int, int] | None:
        """Line and column of a value or of the nearest enclosing one that is written."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return None


def read_yaml(text: str) -> Located:
    """Parse one YAML document safely.

    Raises:
        yaml.YAMLError: The text is not YAML; the error's ``problem_mark`` says where.
    """
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    if node is None:
        return Located({}, {(): (1, 1)}, ())
    places: dict[Place, tuple[int, int]] = {}
    problems = tuple(_walk(node, (), places, set()))
    return Located(yaml.safe_load(text), places, problems)


def _walk(
    node: yaml.Node, path: Place, places: dict[Place, tuple[int, int]], above: set[int]
) -> Iterator[Problem]:
    places.setdefault(path, (node.start_mark.line + 1, node.start_mark.column + 1))
    if id(node) in above:
        yield Problem(path, "an alias that contains itself")
        return
    above = above | {id(node)}
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            name = str(key.value)
            if name in seen:
                yield Problem((*path, name), f"the key '{name}' is given twice")
            seen.add(name)
            places[(*path, name)] = (key.start_mark.line + 1, key.start_mark.column + 1)
            yield from _walk(value, (*path, name), places, above)
    elif isinstance(node, yaml.SequenceNode):
        for index, item in enumerate(node.value):
            yield from _walk(item, (*path, index), places, above)


def override(located: Located, setting: str) -> Iterator[Problem]:
    """Put one ``path.to.key=value`` into the data; the value is YAML."""
    path, equals, text = setting.partition("=")
    parts = path.strip().split(".")
    where: Place = (_named(setting),)
    if not equals or not all(parts):
        yield Problem(where, "is not of the form path.to.key=value")
        return
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        yield Problem(where, "the value is not YAML")
        return
    at = located.data
    reached: Place = ()
    for depth, part in enumerate(parts, start=1):
        if isinstance(at, list) and part.isdigit() and int(part) < len(at):
            key: str | int = int(part)
        elif isinstance(at, dict):
            key = part
        else:
            yield Problem(where, f"the file has no '{part}' there")
            return
        reached = (*reached, key)
        if depth == len(parts):
            at[key] = value
        elif isinstance(at, dict) and not isinstance(at.get(key), dict | list):
            at[key] = {}
        at = at[key]
    located.overridden[reached] = setting


def _named(setting: str) -> str:
    """What messages call an override: one line, however many it was given in."""
    shown = " ".join(setting.split())
    return f"--set {shown if len(shown) <= SHOWN else shown[: SHOWN - 1] + '…'}"


def line(origin: str, located: Located, problem: Problem) -> str:
    """A problem as the line that a user reads, with file, line and column."""
    path = ".".join(str(part) for part in problem.path)
    if path.startswith("--set"):
        return f"{path}: {problem.message}"
    for end in range(len(problem.path), 0, -1):
        setting = located.overridden.get(problem.path[:end])
        if setting is not None:
            return f"{_named(setting)}: {path}: {problem.message}"
    place = located.place(problem.path)
    mark = f":{place[0]}:{place[1]}" if place else ""
    return f"{origin}{mark}: {path + ': ' if path else ''}{problem.message}"


def read_file(path: Path, kind: str) -> str:
    """The text of a recipe, or of a comparison.

    Raises:
        RecipeError: The file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise RecipeError(f"cannot read the {kind} {path}: {reason}") from error


def checked(
    text: str,
    origin: str,
    overrides: Sequence[str],
    build: Callable[[Any, list[Problem]], T | None],
) -> T:
    """Parse, override and build; all mistakes are told together.

    Args:
        text: The YAML text.
        origin: What messages call it.
        overrides: Settings as ``path.to.key=value``.
        build: Makes the result from plain data, or notes what is wrong with them.

    Raises:
        RecipeError: The text has mistakes; the message lists all of them, a line each.
    """
    try:
        located = read_yaml(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}:{mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{origin}{place}: not YAML: {problem}") from error
    problems = list(located.problems)
    problems += [p for setting in overrides for p in override(located, setting)]
    made = None if problems else build(located.data, problems)
    if made is None or problems:
        lines = dict.fromkeys(line(origin, located, problem) for problem in problems)
        raise RecipeError("\n".join(lines))
    return made
