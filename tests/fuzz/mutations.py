"""Seeded damage: to the tree that a text stands for, and to its bytes."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from typing import Any

Tree = Any
Dump = Callable[[Tree], str]

# Values that have broken readers: sizes, signs, kinds, and texts that look like something else.
ODD: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 2, 3.0, 0.5, -0.0, 1e308, float("inf"), float("nan")),
    *(2**31, 2**31 - 1, 2**63, 10**12, -(10**18), 10**4400),
    *(
        "",
        " ",
        "a",
        "none",
        "null",
        "true",
        "0",
        "-1",
        "1e-4",
        "010",
        "1:30",
        "yes",
        "~",
        "~nosuch",
    ),
    *(
        "\ud800",
        "\x00",
        "\x1b[31mred",
        "[bold]x[/bold]",
        "\u202e",
        "é" * 3,
        "x" * 5000,
        "/dev/zero",
    ),
    *("../..", ".", "/", "a\nb", "builtin", "self", "telescoped", "weighted(1,1.2.3)", "ema(9e9)"),
    *("weighted(0,0)", "ema(0.5)", "*a", "&a", "!!python/name:os.system", "{", "%", "@", "`"),
    *([], {}, [[]], [None], {"a": 1}, [0, 0], [1e400], {"": ""}, [{}], ["none"], [-1]),
)
BYTES = (
    *(b"\x00", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\r", b"\t", b"\x85", b"\xe2\x80\xa8"),
    *(b"{", b"}", b"[", b"]", b'"', b"'", b":", b"- ", b"? ", b"&a ", b"*a", b"!!set ", b"!x "),
    *(b"<<: ", b"---\n", b"...\n", b"%YAML 1.1\n", b"#", b"|\n", b">\n", b"010", b"1e999", b"NaN"),
    *(b"[" * 300, b"9" * 5000, b'"\\ud800"', b"\\", b",", b"\n", b"  ", b"Infinity", b"-"),
)


def damaged(rng: random.Random, seeds: list[Tree], dump: Dump) -> bytes:
    """One of the trees, damaged in a few places, in its tree, in its bytes or in both."""
    tree = copy.deepcopy(rng.choice(seeds))
    in_tree = rng.random() < 0.7
    if in_tree:
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            tree = _tree(rng, tree, seeds)
    try:
        content = dump(tree).encode("utf-8", "surrogatepass")
    except (ValueError, RecursionError):
        # Numbers that Python does not write.
        content = b"9" * 5000
    if not in_tree or rng.random() < 0.15:
        for _ in range(rng.choice((1, 1, 2, 4))):
            content = _bytes(rng, content)
    return content


def as_json(tree: Tree) -> str:
    """Compact JSON, with the words that Python has for what JSON cannot say."""
    return json.dumps(tree, ensure_ascii=False)


def _places(tree: Tree) -> Iterator[tuple[Any, Any]]:
    """Every container with each of its keys."""
    if isinstance(tree, dict | list):
        for key, value in list(tree.items() if isinstance(tree, dict) else enumerate(tree)):
            yield tree, key
            yield from _places(value)


def _tree(rng: random.Random, tree: Tree, seeds: list[Tree]) -> Tree:
    places = list(_places(tree))
    if not places or rng.random() < 0.02:
        return copy.deepcopy(rng.choice(ODD))
    holder, key = rng.choice(places)
    kind = rng.randrange(8)
    if kind <= 2:
        holder[key] = copy.deepcopy(rng.choice(ODD))
    elif kind == 3:
        del holder[key]
    elif kind == 4:
        # Something from elsewhere.
        other, place = rng.choice(list(_places(rng.choice(seeds))) or places)
        holder[key] = copy.deepcopy(other[place])
    elif kind == 5 and isinstance(holder, list):
        holder.insert(rng.randrange(len(holder) + 1), copy.deepcopy(holder[key]))
    elif kind == 5:
        holder[_name(rng, str(key))] = holder.pop(key)
    elif kind == 6 and type(holder[key]) in (int, float):
        holder[key] = holder[key] * rng.choice((-1, 0, 2, 10, 1.5)) + rng.choice((-1, 0, 1))
    elif kind == 6:
        holder[key] = _text(holder[key])[:200]
    else:
        holder[key] = [holder[key]] if rng.random() < 0.5 else {"a": holder[key]}
    return tree


def _text(value: object) -> str:
    """A value as text; Python refuses to write out the longest numbers."""
    try:
        return str(value)
    except ValueError:
        return "9" * 200


def _name(rng: random.Random, name: str) -> str:
    """A key that is nearly right."""
    if name and rng.random() < 0.5:
        at = rng.randrange(len(name))
        return name[:at] + name[at + 1 :]
    return rng.choice(("", "a", "<<", "1", "null", "methods", "op", "sum", "label", name + "x"))


def _bytes(rng: random.Random, content: bytes) -> bytes:
    at = rng.randrange(len(content) + 1)
    end = min(len(content), at + rng.choice((1, 1, 2, 8, 40)))
    kind = rng.randrange(6)
    if kind == 0:
        return content[:at]
    if kind == 1:
        return content[:at] + content[end:]
    if kind == 2:
        return content[:at] + rng.choice(BYTES) + content[at:]
    if kind == 3:
        return content[:at] + bytes([rng.randrange(256)]) + content[at + 1 :]
    if kind == 4:
        return content[:end] + content[at:]
    return content[:at] + rng.choice(BYTES) + content[end:]
