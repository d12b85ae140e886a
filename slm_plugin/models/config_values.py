"""Checks of single values in ``config.json``: each names field, value and what is wanted."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from slm_plugin.errors import ModelSourceError

Field = Callable[[str, Any], None]
# PyTorch counts elements in 64 bits; a size beyond this is a mistake in any model.
LARGEST = 2**31 - 1
SHOWN = 40
TRAINED_ACTIVATIONS = ("prelu", "xielu")


@dataclass(frozen=True, slots=True)
class Where:
    """A config file, or an object in it, as messages name it.

    Attributes:
        file: The file.
        part: Name of the object, where it is not the whole file.
    """

    file: str
    part: str = ""

    def at(self, field: str) -> str:
        """One of its fields."""
        return f"{self.part}.{field} of {self.file}".lstrip(".")

    def inside(self, part: str) -> Where:
        """An object in it."""
        return Where(self.file, part)

    def __str__(self) -> str:
        """The file, or the object and its file."""
        return f"{self.part} of {self.file}" if self.part else self.file

    def contradiction(self, what: str) -> ModelSourceError:
        """Two statements that cannot both hold."""
        return ModelSourceError(
            f"{self} contradicts itself: {what}", hint="keep the one that is right"
        )

    def check_agreement(self, stated: Mapping[str, Any]) -> None:
        """Check that one thing, stated in several places, has one value.

        Raises:
            ModelSourceError: The values differ.
        """
        if len({*stated.values()}) > 1:
            raise self.contradiction(" and ".join(f"{at} {value}" for at, value in stated.items()))


def problem(place: str, value: Any, wanted: str) -> ModelSourceError:
    """A value that is not what its field takes."""
    shown = json.dumps(value, default=repr)
    shown = shown if len(shown) <= SHOWN else shown[:SHOWN] + "…"
    return ModelSourceError(
        f"{place} is {shown}, but must be {wanted}", hint="correct it in config.json"
    )


def whole(place: str, value: Any, *, least: int = 0) -> None:
    """A whole number, not a truth value, not below ``least``.

    Raises:
        ModelSourceError: It is something else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= LARGEST:
        raise problem(place, value, f"a whole number from {least} to {LARGEST}")


def count(place: str, value: Any) -> None:
    """A whole number from 1.

    Raises:
        ModelSourceError: It is something else.
    """
    whole(place, value, least=1)


def positive(place: str, value: Any) -> None:
    """A finite number above zero.

    Raises:
        ModelSourceError: It is something else.
    """
    if not _is_number(value) or value <= 0:
        raise problem(place, value, "a number above 0")


def share(place: str, value: Any) -> None:
    """A number from 0, below 1.

    Raises:
        ModelSourceError: It is something else.
    """
    if not _is_number(value) or not 0 <= value < 1:
        raise problem(place, value, "a number from 0 to below 1")


def truth(place: str, value: Any) -> None:
    """True or false.

    Raises:
        ModelSourceError: It is something else.
    """
    if not isinstance(value, bool):
        raise problem(place, value, "true or false")


def token(place: str, value: Any) -> None:
    """A token id; old configs write -1 where there is none.

    Raises:
        ModelSourceError: It is something else.
    """
    whole(place, value, least=-1)


def tokens(place: str, value: Any) -> None:
    """A token id or a list of them.

    Raises:
        ModelSourceError: It is something else.
    """
    for one in value if isinstance(value, list) else [value]:
        token(place, one)


def only(wanted: bool) -> Field:
    """The one truth value that all but a few checkpoints of a class have."""

    def checked(place: str, value: Any) -> None:
        if value is not wanted:
            shown = json.dumps(wanted)
            raise problem(place, value, f"{shown}: its other form is not supported")

    return checked


def flags(place: str, value: Any) -> None:
    """Null, or a list of 0 and 1.

    Raises:
        ModelSourceError: It is something else.
    """
    if value is None:
        return
    if not isinstance(value, list) or any(one not in (0, 1) for one in value):
        raise problem(place, value, "null or a list of 0 and 1")


def activation(place: str, value: Any) -> None:
    """An activation without weights of its own, for which a checkpoint would have no place.

    Raises:
        ModelSourceError: It is something else.
    """
    from transformers.activations import ACT2FN

    if not isinstance(value, str) or value not in ACT2FN or value in TRAINED_ACTIVATIONS:
        raise problem(place, value, "an activation of transformers, as silu")


def optional(check: Field) -> Field:
    """The same check, but null is fine."""

    def checked(place: str, value: Any) -> None:
        if value is not None:
            check(place, value)

    return checked


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e30 and math.isfinite(value)
