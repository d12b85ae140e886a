"""YAML as recipes use it: what a value is, and what is refused within which bounds."""

from __future__ import annotations

import time
from typing import Any

import pytest

from slm_plugin.recipe.document import read_yaml
from slm_plugin.recipe.loader import MOST_LEVELS, MOST_VALUES, Unreadable

VALUES: list[tuple[str, Any]] = [
    ("1e-4", 1e-4),
    ("1E5", 1e5),
    (".5e3", 500.0),
    ("1.", 1.0),
    ("+1", 1),
    ("-0", 0),
    ("0o10", 8),
    ("0x1F", 31),
    ("!!float 4", 4.0),
    ("!!str 010", "010"),
    ("! 5", "5"),
    ('"1e-4"', "1e-4"),
    ("1_000", "1_000"),
    ("1:30", "1:30"),
    ("2024-01-01", "2024-01-01"),
    ("yes", "yes"),
    ("off", "off"),
    ("True", True),
    ("~", None),
    ("", None),
    ("null", None),
    ("=", "="),
    ("9223372036854775807", 2**63 - 1),
]
REFUSED = [
    ("010", 'write 10, or "010" for a text'),
    ("-007", 'write -7, or "-007" for a text'),
    ("00", 'write 0, or "00" for a text'),
    ("9" * 5000, "is beyond 63 bits"),
    ("0x" + "f" * 5000, "is beyond 63 bits"),
    (str(2**63), "is beyond 63 bits"),
    (".inf", "is no finite number"),
    (".NaN", "is no finite number"),
    ("1e400", "is no finite number"),
    ("!!binary aGk=", "the tag '!!binary' is not read here"),
    ("!!timestamp 2024-01-01", "the tag '!!timestamp' is not read here"),
    ("!!set {a, b}", "the tag '!!set' is not read here"),
    ("!!omap [a: 1]", "the tag '!!omap' is not read here"),
    ("!!python/name:os.system x", "the tag '!!python/name:os.system' is not read here"),
    ("!mine {a: 1}", "the tag '!mine' is not read here"),
    ("!!int yes", "'yes' is no int"),
    ("!!int 1.5", "'1.5' is no int"),
    ('"\\ud800"', r"half a character \(U\+D800\)"),
    ("{1: a}", 'the key 1 is no text; write "1"'),
    ("{null: a}", 'the key null is no text; write "null"'),
    ("{? [a] : 1}", "a key is a text, not a list or a mapping"),
    ("{a: 1, a: 2}", "the key 'a' is given twice"),
    ("{<<: {a: 1}, <<: {b: 1}}", "the key '<<' is given twice"),
    ("{<<: 3}", "`<<` takes a mapping"),
    ("&a [*a]", "an alias that contains itself"),
    ("&a {<<: *a}", "an alias that contains itself"),
]
UNREADABLE = [
    ("a: 1\n---\nb: 2\n", "a second document begins here"),
    ("a: 1\x00", r"U\+0000 cannot stand in YAML"),
    ("a: \x07", r"U\+0007 cannot stand in YAML"),
    ('a: "\\UFFFFFFFF"', "a character or number that does not exist"),
    ("a: *b", "undefined alias"),
    ("a: &b 1\nc: &b 2\n", "two values have one &anchor"),
    ("[" * 5000, "levels deep"),
    ("- " * 5000, "levels deep"),
    ("{a: " * 5000, "levels deep"),
    ("[" + "1," * 500_000 + "]", "more than 20,000 values"),
    ("- 1\n" * 250_000, "more than 20,000 values"),
]


@pytest.mark.parametrize(("text", "value"), VALUES)
def test_a_value_is_what_it_looks_like(text: str, value: Any) -> None:
    """As in the core schema of YAML 1.2, whatever YAML 1.1 makes of it."""
    found = read_yaml(f"a: {text}")
    assert found.problems == ()
    assert found.data == {"a": value} and type(found.data["a"]) is type(value)


@pytest.mark.parametrize(("text", "words"), REFUSED)
def test_what_readers_disagree_on_is_refused_at_its_place(text: str, words: str) -> None:
    """One problem, which begins inside the second line, and no value made of it."""
    found = read_yaml(f"b: 1\na: {text}\n")
    (problem,) = found.problems
    with pytest.raises(ValueError, match=words):
        raise ValueError(problem.message)
    place = found.place(problem.path)
    assert place is not None and place[0] == 2
    assert len(problem.message) < 200


@pytest.mark.parametrize(
    ("text", "data"),
    [
        ("a:\t1", {"a": 1}),
        ("-\tx\n- \t y\t\n", ["x", "y"]),
        ("a:\n  -\t0.5\t# half\n", {"a": [0.5]}),
        ("a\t: {b:\t1,\tc: [2,\n\t3\t]\t}\t", {"a": {"b": 1, "c": [2, 3]}}),
        ("\t\n \t# c\na:\t\n  b:\t'q\tr'\n", {"a": {"b": "q\tr"}}),
        ("a: &x\t1\nb:\t*x\nc: |\n  t\tu\n", {"a": 1, "b": 1, "c": "t\tu\n"}),
    ],
)
def test_tabs_part_what_stands_in_a_line(text: str, data: object) -> None:
    """White space is spaces and tabs, behind colons, dashes and commas and before comments."""
    found = read_yaml(text)
    assert (found.data, found.problems) == (data, ())


@pytest.mark.parametrize(
    ("text", "place"),
    [("a:\n\tb: 1", (2, 1)), (" \ta: 1", (1, 2)), ("a:\r\n  b: 1\r\n\t c: 2", (3, 1))],
)
def test_tabs_indent_nothing(text: str, place: tuple[int, int]) -> None:
    """Nobody knows how wide a tab is."""
    with pytest.raises(Unreadable, match="indent by spaces") as caught:
        read_yaml(text)
    assert caught.value.place == place


@pytest.mark.parametrize("text", ["-\ta: 1", "-\t- 1", "? \t- 1"])
def test_nothing_begins_behind_a_tab_that_later_lines_could_go_on(text: str) -> None:
    """A mapping or list in the line of a dash is indented by what stands before it."""
    with pytest.raises(Unreadable, match="not allowed here"):
        read_yaml(text)


@pytest.mark.parametrize(("text", "words"), UNREADABLE)
def test_what_is_no_document_ends_soon(text: str, words: str) -> None:
    """Neither depth nor length of a text costs more than a moment."""
    started = time.process_time()
    with pytest.raises(Unreadable, match=words):
        read_yaml(text)
    assert time.process_time() - started < 5


@pytest.mark.parametrize("merging", [False, True])
def test_aliases_cannot_grow_without_bound(merging: bool) -> None:
    """Thirty lines that stand for 9 to the power of 29 values, as items and as merged keys."""
    lines = ["k0: &k0 {a: 1}"]
    for number in range(1, 30):
        nine = ", ".join([f"*k{number - 1}"] * 9)
        made = f"{{<<: [{nine}]}}" if merging else f"[{nine}]"
        lines.append(f"k{number}: &k{number} {made}")
    with pytest.raises(Unreadable, match=f"more than {MOST_VALUES:,} values"):
        read_yaml("\n".join(lines))


def test_aliases_cannot_nest_without_bound() -> None:
    """Each level is short, and all together are too deep."""
    lines = ["k0: &k0 1"] + [f"k{i}: &k{i} [[[[*k{i - 1}]]]]" for i in range(1, MOST_LEVELS)]
    with pytest.raises(Unreadable, match="levels deep"):
        read_yaml("\n".join(lines))


def test_merged_keys_yield_to_those_beside_them() -> None:
    """Own keys first, then those of the first mapping that has them; aliases are copies."""
    found = read_yaml("a: &a {x: 1, y: {z: 2}}\nb: {<<: [*a, {x: 5, w: 6}], x: 3}\n")
    assert found.problems == ()
    assert found.data["b"] == {"x": 3, "y": {"z": 2}, "w": 6}
    assert found.data["b"]["y"] is not found.data["a"]["y"]
    assert found.place(("b", "y", "z")) == (1, 18)


def test_an_empty_text_is_null() -> None:
    """As the value of a key: a comment is nothing."""
    assert read_yaml("# nothing\n").data is None
