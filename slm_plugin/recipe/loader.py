"""YAML loader of recipes: plain values by the rules of YAML 1.2, with size limits.

PyYAML follows YAML 1.1, in which ``1e-4`` is a text, ``010`` is 8, ``1:30`` is 90 and ``no`` is
false. This loader follows the core schema of YAML 1.2 for numbers, ``true``, ``false``, ``null``
and texts, and rejects what YAML readers interpret differently. No value creates an object of a
class.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml

from slm_plugin.texts import shown

# A recipe is written by hand; a file beyond these bounds is something else, or an attack.
MOST_VALUES = 20_000
MOST_LEVELS = 32
MOST_BITS = 63

_TAG = "tag:yaml.org,2002:"
_PLAIN = re.compile(
    r"(?P<null>~|null|Null|NULL|)"
    r"|(?P<bool>true|True|TRUE|false|False|FALSE)"
    r"|(?P<octal>[-+]?0[0-9]+)"
    r"|(?P<int>[-+]?(?:0|[1-9][0-9]*)|0o[0-7]+|0x[0-9a-fA-F]+)"
    r"|(?P<float>[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))",
)
_BASES = {"0o": 0, "0x": 0}
# Tags that state a value's own type, or make it a text.
_KNOWN = ("str", "int", "float", "bool", "null")


class Unreadable(Exception):
    """An invalid YAML document, with line and column (from 1) where there is one."""

    def __init__(self, message: str, place: tuple[int, int] | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.place = place


class _Loader(yaml.SafeLoader):
    """Composes nodes within the limits, without resolving plain values."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - as PyYAML declares it

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.values = 0
        self.level = 0

    def scan_to_next_token(self) -> None:
        """Skip white space, in which YAML 1.2 counts tabs as long as they indent nothing."""
        while True:
            super().scan_to_next_token()
            if self.peek() != "\t":
                return
            width = 1
            while self.peek(width) in " \t":
                width += 1
            before = self.buffer[self.pointer - self.column : self.pointer]
            blank = self.peek(width) in "#\0\r\n"
            if not (self.flow_level or blank or before.strip(" \t\ufeff")):
                place = (self.line + 1, self.column + 1)
                raise Unreadable("a tab indents this line; indent by spaces", place)
            if not self.flow_level:
                # Neither does a tab indent what begins behind a dash.
                self.allow_simple_key = False
            self.forward(width)

    def next_event(self) -> Any:
        """What comes next."""
        return self.peek_event()  # type: ignore[no-untyped-call]

    def place(self) -> tuple[int, int]:
        """Line and column of what comes next."""
        mark = self.next_event().start_mark
        return mark.line + 1, mark.column + 1

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        place = self.place()
        self.values += 1
        if self.values > MOST_VALUES:
            raise Unreadable(f"more than {MOST_VALUES:,} values", place)
        if self.level > MOST_LEVELS:
            raise Unreadable(f"nested more than {MOST_LEVELS} levels deep", place)
        self.level += 1
        try:
            return super().compose_node(parent, index)
        finally:
            self.level -= 1

    def compose_scalar_node(self, anchor: Any) -> yaml.ScalarNode:
        # Without resolvers plain and quoted nodes have the same tag; only the event differs.
        event = self.next_event()
        node = super().compose_scalar_node(anchor)
        if event.tag in (None, "!"):
            plain = event.tag is None and event.implicit[0]
            node.tag = "" if plain else f"{_TAG}str"
        return node


def compose(text: str) -> yaml.Node | None:
    """The nodes of one YAML document; None where it is empty.

    A plain value has no tag, a quoted one that of a text.

    Raises:
        Unreadable: The text is no YAML document, holds several, or is beyond the bounds.
    """
    try:
        loader = _Loader(text)
        node: yaml.Node | None = loader.get_node() if loader.check_node() else None
        if loader.check_node():
            raise Unreadable("a second document begins here", loader.place())
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        place = (before.count("\n") + 1, len(before) - before.rfind("\n"))
        code = error.character if isinstance(error.character, int) else ord(error.character)
        raise Unreadable(f"the character U+{code:04X} cannot stand in YAML", place) from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        at = (mark.line + 1, mark.column + 1) if mark else None
        problem = getattr(error, "problem", None) or "damaged"
        if problem == "second occurrence":
            problem = "two values have one &anchor"
        raise Unreadable(problem, at) from error
    except (ValueError, OverflowError) as error:
        # "\UFFFFFFFF" in quotes, and numbers in directives.
        raise Unreadable(f"a character or number that does not exist ({error})") from error
    return node


def scalar(node: yaml.ScalarNode) -> Any:
    """The value of a node without parts.

    Raises:
        ValueError: It has none; the message says what to write instead.
    """
    text = str(node.value)
    surrogate = next((c for c in text if "\ud800" <= c <= "\udfff"), None)
    if surrogate is not None:
        raise ValueError(f"holds half a character (U+{ord(surrogate):04X}), which is no text")
    kind = node.tag.removeprefix(_TAG)
    if kind == "str":
        return text
    if node.tag and kind not in _KNOWN:
        raise ValueError(f"{_unknown_tag(node)}; write the value without it")
    match = _PLAIN.fullmatch(text)
    found = match.lastgroup if match else "str"
    if kind and (found, kind) not in ((kind, kind), ("int", "float")):
        raise ValueError(f"'{shown(text)}' is no {kind}; write the value without !!{kind}")
    if found == "octal":
        digits = shown(text.lstrip("+-0") or "0")
        sign = "-" if text.startswith("-") else ""
        raise ValueError(
            f"{shown(text)} is another number to every reader of YAML; "
            f'write {sign}{digits}, or "{shown(text)}" for a text'
        )
    if found == "int":
        value = _integer(text)
        return float(value) if kind == "float" else value
    if found == "float":
        return _float(text)
    if found == "bool":
        return text.lower() == "true"
    return None if found == "null" else text


def check_tag(node: yaml.Node) -> None:
    """Check that a mapping or list has no tag of another type.

    Raises:
        ValueError: It is.
    """
    own = "map" if isinstance(node, yaml.MappingNode) else "seq"
    if node.tag not in (f"{_TAG}{own}", "!"):
        raise ValueError(f"{_unknown_tag(node)}; write the value without it")


def is_merge(node: yaml.Node) -> bool:
    """Whether a key is a plain ``<<``, the merge key."""
    plain = node.tag in ("", f"{_TAG}merge")
    return isinstance(node, yaml.ScalarNode) and plain and node.value == "<<"


def merged(node: yaml.Node) -> Iterator[yaml.MappingNode]:
    """The mappings after ``<<``.

    Raises:
        ValueError: The value is something else.
    """
    listed = node.value if isinstance(node, yaml.SequenceNode) else [node]
    for one in listed:
        if not isinstance(one, yaml.MappingNode):
            raise ValueError("`<<` takes a mapping, or a list of mappings, mostly as *alias")
        yield one


def _unknown_tag(node: yaml.Node) -> str:
    tag = node.tag.replace(_TAG, "!!") if node.tag.startswith(_TAG) else node.tag
    return f"the tag '{shown(tag)}' is not read here"


def _integer(text: str) -> int:
    digits = text.lower().lstrip("+-")
    base = _BASES.get(digits[:2], 10)
    # Python refuses to read thousands of digits.
    if len(digits) > MOST_BITS + 2 or int(digits, base) >> MOST_BITS:
        raise ValueError(f"{shown(text, 24)} is beyond {MOST_BITS} bits")
    return -int(digits, base) if text.startswith("-") else int(digits, base)


def _float(text: str) -> float:
    value = math.nan if text.lower().endswith(("inf", "nan")) else float(text)
    if not math.isfinite(value):
        raise ValueError(f"{shown(text, 24)} is no finite number")
    return value
