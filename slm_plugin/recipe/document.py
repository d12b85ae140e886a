"""A recipe as a YAML document: data, positions, overrides, mistakes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from slm_plugin.errors import RecipeError
from slm_plugin.recipe.loader import (
    MOST_LEVELS,
    MOST_VALUES,
    Unreadable,
    check_tag,
    compose,
    is_merge,
    merged,
    scalar,
)
from slm_plugin.recipe.mistakes import Mistakes, Place, Problem
from slm_plugin.texts import read_text, shown

T = TypeVar("T")
# Characters of an override that messages show: enough to recognise it.
SHOWN = 72
# Largest message in characters and largest number of reported mistakes.
LONGEST = 600
MOST_LINES = 50
# Bytes of a recipe file.
LARGEST = 1 << 20


@dataclass(frozen=True, slots=True)
class Located:
    """A YAML document as plain data, with line and column (from 1) of every key and item.

    ``overridden`` holds the override of each changed place, ``caused`` the override behind each
    problem elsewhere.
    """

    data: Any
    places: dict[Place, tuple[int, int]]
    problems: tuple[Problem, ...]
    overridden: dict[Place, str] = field(default_factory=dict)
    caused: dict[Problem, str] = field(default_factory=dict)

    def setting(self, path: Place) -> str | None:
        """The override that gave a value, or one that encloses it."""
        ends = range(len(path), 0, -1)
        return next((self.overridden[path[:e]] for e in ends if path[:e] in self.overridden), None)

    def place(self, path: Place) -> tuple[int, int] | None:
        """Line and column of a value or of the nearest enclosing one in the file."""
        for end in range(len(path), -1, -1):
            if path[:end] in self.places:
                return self.places[path[:end]]
        return None


def read_yaml(text: str) -> Located:
    """Parse one YAML document; see `loader` for what a value is.

    Raises:
        Unreadable: The text is not YAML, or beyond the bounds.
    """
    node = compose(text)
    if node is None:
        return Located(None, {(): (1, 1)}, ())
    walk = _Walk()
    data = walk.value(node, (), frozenset())
    return Located(data, walk.places, tuple(walk.problems))


class _Walk:
    """Converts nodes to plain data, and records positions and mistakes.

    Every alias gets a copy, so that an override changes only one place.
    """

    def __init__(self) -> None:
        self.places: dict[Place, tuple[int, int]] = {}
        self.problems: list[Problem] = []
        self._values = 0

    def value(self, node: yaml.Node, path: Place, above: frozenset[int]) -> Any:
        """The data of a node.

        Raises:
            Unreadable: Aliases expand to more values or levels than allowed.
        """
        place = _mark(node)
        self.places.setdefault(path, place)
        if id(node) in above:
            self._note(path, "an alias that contains itself")
            return None
        self._count(node)
        if len(path) > MOST_LEVELS:
            raise Unreadable(f"aliases nest more than {MOST_LEVELS} levels deep", place)
        try:
            if isinstance(node, yaml.ScalarNode):
                return scalar(node)
            check_tag(node)
        except ValueError as error:
            self._note(path, str(error))
            return None
        above = above | {id(node)}
        if isinstance(node, yaml.SequenceNode):
            return [self.value(item, (*path, i), above) for i, item in enumerate(node.value)]
        return self._mapping(node, path, above)

    def _mapping(self, node: yaml.Node, path: Place, above: frozenset[int]) -> dict[str, Any]:
        made: dict[str, Any] = {}
        for name, key, value in self._pairs(node, path, above):
            self.places[(*path, name)] = _mark(key)
            made[name] = self.value(value, (*path, name), above)
        return made

    def _pairs(
        self, node: yaml.Node, path: Place, above: frozenset[int]
    ) -> Iterator[tuple[str, yaml.Node, yaml.Node]]:
        """Keys with their values: a mapping's own, then those merged by ``<<``."""
        seen: set[str] = set()
        before: yaml.Node | None = None
        others: list[yaml.MappingNode] = []
        merges = 0
        for key, value in node.value:
            before, number = value, _decimal(before, key, value)
            if number:
                self._note(path, f"a comma separates keys; write {number}", key)
            elif is_merge(key):
                merges += 1
                others += self._merged(key, value, path)
            elif (name := self._name(key, path)) is not None:
                if name in seen:
                    self._note((*path, name), f"the key '{shown(name)}' is given twice", key)
                seen.add(name)
                yield name, key, value
        if merges > 1:
            self._note((*path, "<<"), "the key '<<' is given twice; give one, with a list")
        for other in others:
            self._count(other)
            if id(other) in above:
                self._note((*path, "<<"), "an alias that contains itself")
                continue
            for name, key, value in self._pairs(other, path, above | {id(other)}):
                if name not in seen:
                    seen.add(name)
                    yield name, key, value

    def _merged(self, key: yaml.Node, value: yaml.Node, path: Place) -> list[yaml.MappingNode]:
        self.places.setdefault((*path, "<<"), _mark(key))
        try:
            return list(merged(value))
        except ValueError as error:
            self._note((*path, "<<"), str(error))
            return []

    def _name(self, key: yaml.Node, path: Place) -> str | None:
        """A key, which is a text."""
        if not isinstance(key, yaml.ScalarNode):
            self._note(path, "a key is a text, not a list or a mapping", key)
            return None
        try:
            name = scalar(key)
        except ValueError as error:
            self._note((*path, str(key.value)), f"the key is no text: {error}", key)
            return None
        if isinstance(name, str):
            return name
        written = shown(key.value)
        self._note((*path, str(key.value)), f'the key {written} is no text; write "{written}"', key)
        return None

    def _count(self, node: yaml.Node) -> None:
        self._values += 1
        if self._values > MOST_VALUES:
            raise Unreadable(f"aliases make more than {MOST_VALUES:,} values of it", _mark(node))

    def _note(self, path: Place, message: str, node: yaml.Node | None = None) -> None:
        if node is not None:
            self.places[path] = _mark(node)
        self.problems.append(Problem(path, message))


def _decimal(before: yaml.Node | None, key: yaml.Node, value: yaml.Node) -> str:
    """The number that two keys of ``{ratio: 0,2}`` are meant for; empty where they are two."""
    parts = [getattr(node, "value", None) for node in (before, key)]
    whole = all(isinstance(part, str) and part.isascii() and part.isdecimal() for part in parts)
    return f"{parts[0]}.{parts[1]}" if whole and value.value == "" else ""


def _mark(node: yaml.Node) -> tuple[int, int]:
    return node.start_mark.line + 1, node.start_mark.column + 1


def override(located: Located, setting: str) -> Iterator[Problem]:
    """Put one ``path.to.key=value`` into the data; the value is YAML."""
    path, equals, text = setting.partition("=")
    parts = path.strip().split(".")
    where: Place = (_named(setting),)
    if not equals or not all(parts) or not path.strip().isprintable():
        yield Problem(where, "is not of the form path.to.key=value")
        return
    if len(parts) > MOST_LEVELS:
        yield Problem(where, f"leads more than {MOST_LEVELS} levels deep")
        return
    try:
        found = read_yaml(text)
    except Unreadable as error:
        yield Problem(where, f"the value is not YAML: {error.message}")
        return
    if found.problems:
        for problem in found.problems:
            inside = _dotted(problem.path)
            yield Problem(where, f"{inside}: {problem.message}" if inside else problem.message)
        return
    at = located.data
    reached: Place = ()
    for depth, part in enumerate(parts, start=1):
        if isinstance(at, list) and (number := _number(part)) is not None and number < len(at):
            key: str | int = number
        elif isinstance(at, dict):
            key = part
        else:
            yield Problem(where, f"the file has no '{shown(part)}' there")
            return
        reached = (*reached, key)
        if depth == len(parts):
            at[key] = found.data
        elif isinstance(at, dict) and not isinstance(at.get(key), dict | list):
            at[key] = {}
        at = at[key]
    located.overridden[reached] = setting


def _number(part: str) -> int | None:
    """The list index that a part of a path names."""
    return int(part) if part.isascii() and part.isdecimal() and len(part) < 9 else None


def _named(setting: str) -> str:
    """An override in messages, as one line."""
    return f"--set {shown(' '.join(setting.split()), SHOWN)}"


def _dotted(path: Place) -> str:
    return shown(".".join(str(part) for part in path), LONGEST)


def line(origin: str, located: Located, problem: Problem) -> str:
    """A problem as the line that a user reads, with file, line and column."""
    message = shown(problem.message, LONGEST)
    path = _dotted(problem.path)
    if path.startswith("--set"):
        return f"{path}: {message}"
    setting = located.setting(problem.path) or located.caused.get(problem)
    if setting is not None:
        return f"{_named(setting)}: {path + ': ' if path else ''}{message}"
    place = located.place(problem.path)
    mark = f":{place[0]}:{place[1]}" if place else ""
    return f"{origin}{mark}: {path + ': ' if path else ''}{message}"


def _blame(
    text: str,
    overrides: Sequence[str],
    build: Callable[[Any, Mistakes], object],
    located: Located,
    problems: Sequence[Problem],
) -> None:
    """For each problem that the file alone does not have, record the override that causes it."""
    left = {problem for problem in problems if located.setting(problem.path) is None}
    for count in range(len(overrides)):
        if not left:
            return
        trial = _read(text)
        for setting in overrides[:count]:
            list(override(trial, setting))
        found: list[Problem] = []
        build(trial.data, Mistakes((), found))
        if count:
            located.caused.update(dict.fromkeys(left.intersection(found), overrides[count - 1]))
        left.difference_update(found)
    if overrides:
        located.caused.update(dict.fromkeys(left, overrides[-1]))


def _read(text: str) -> Located:
    """A file's document; an empty one is a mapping without keys."""
    located = read_yaml(text)
    return replace(located, data={}) if located.data is None else located


def read_file(path: Path, kind: str) -> str:
    """The text of a recipe, or of a comparison; a pipe can be read once.

    Raises:
        RecipeError: The file cannot be read, or is larger than any recipe.
    """
    return read_text(path, f"the {kind}", RecipeError, LARGEST)


def has_key(text: str, key: str) -> bool:
    """Whether a text is a YAML mapping with a key, as far as it can be read."""
    try:
        data = read_yaml(text).data
    except Unreadable:
        return False
    return isinstance(data, dict) and key in data


def checked_data(data: Any, origin: str, build: Callable[[Any, Mistakes], T | None]) -> T:
    """Build from data without a file; all mistakes are reported together.

    Raises:
        RecipeError: The data has mistakes; the message lists them, a line each.
    """
    located = Located(data, {}, ())
    mistakes = Mistakes()
    made = build(data, mistakes)
    if made is None or mistakes.found:
        raise RecipeError(_complaint(origin, located, mistakes.found))
    return made


def _complaint(origin: str, located: Located, problems: Sequence[Problem]) -> str:
    lines = list(dict.fromkeys(line(origin, located, problem) for problem in problems))
    if len(lines) > MOST_LINES:
        lines[MOST_LINES:] = [f"{origin}: {len(lines) - MOST_LINES:,} more mistakes"]
    return "\n".join(lines)


def checked(
    text: str,
    origin: str,
    overrides: Sequence[str],
    build: Callable[[Any, Mistakes], T | None],
) -> T:
    """Parse, override and build; all mistakes are reported together.

    Args:
        text: The YAML text.
        origin: Its name in messages.
        overrides: Settings as ``path.to.key=value``.
        build: Builds the result from plain data, or adds mistakes.

    Raises:
        RecipeError: The text has mistakes; the message lists them, a line each.
    """
    try:
        located = _read(text)
    except Unreadable as error:
        place = f":{error.place[0]}:{error.place[1]}" if error.place else ""
        raise RecipeError(f"{origin}{place}: not YAML: {shown(error.message, LONGEST)}") from error
    problems = list(located.problems)
    problems += [p for setting in overrides for p in override(located, setting)]
    made = None
    if not problems:
        made = build(located.data, Mistakes((), problems))
        _blame(text, overrides, build, located, problems)
    if made is None or problems:
        raise RecipeError(_complaint(origin, located, problems))
    return made
