"""Mistakes in a file, collected while it is checked, each with its place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from slm_plugin.errors import SlmError

Place = tuple[str | int, ...]
C = TypeVar("C", covariant=True)


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a file: where it is and what is wrong."""

    path: Place
    message: str


@dataclass(frozen=True, slots=True)
class Placed(Generic[C]):
    """A component and its place in the file."""

    place: Place
    component: C


@dataclass(frozen=True, slots=True)
class Mistakes:
    """Collects the mistakes of a file; one object for each place that is checked.

    Attributes:
        place: The place. Messages are added for it, or for places below it.
        found: All mistakes of the file so far; the objects of all places share the list.
    """

    place: Place = ()
    found: list[Problem] = field(default_factory=list)

    def below(self, *keys: str | int) -> Mistakes:
        """The same collection, for a place below this one."""
        return Mistakes((*self.place, *keys), self.found)

    def at(self, place: Place) -> Mistakes:
        """The same collection, for another place of the file."""
        return Mistakes(place, self.found)

    def add(self, message: str, *keys: str | int) -> None:
        """Add a mistake, here or below here."""
        self.found.append(Problem((*self.place, *keys), message))

    def extend(self, problems: Iterable[Problem]) -> None:
        """Add mistakes that know their places."""
        self.found.extend(problems)

    @contextmanager
    def caught(self, *keys: str | int) -> Iterator[None]:
        """Add the error of a check, if it raises one, here or below here.

        Without keys, an error about one option of a component is added for that option.
        """
        try:
            yield
        except SlmError as error:
            self.add(str(error), *(keys or filter(None, [error.option])))
