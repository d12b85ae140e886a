"""Escape text for Markdown."""

from __future__ import annotations

import re

from slm_plugin.control_characters import visible

_LAYOUT = "\n\t"


class Markdown(str):
    """Markdown source, which is not escaped."""

    __slots__ = ()


def escape(value: object) -> str:
    """Text as one line without HTML, markup, tables or headings."""
    if isinstance(value, Markdown):
        return value
    text = visible(" ".join(str(value).split()))
    text = re.sub(r"([\\`*\[\]|~])", r"\\\1", text)
    # An underscore within a word is no markup, so `torch_pruning` is not escaped.
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
    text = re.sub(r"^([-+=#])(?=[\s\-+=#]|$)", r"\\\1", text)
    text = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: str) -> Markdown:
    """An inline code span, safe in a table cell."""
    line = visible(" ".join(text.split())).replace("|", r"\|")
    ticks = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return Markdown(f"{ticks}{pad}{line}{pad}{ticks}")


def fence(text: str, language: str = "") -> Markdown:
    """A code block with a fence longer than any backtick run inside it."""
    ticks = "`" * max(3, _longest_run(text) + 1)
    return Markdown(f"{ticks}{language}\n{visible(text, keep=_LAYOUT).rstrip()}\n{ticks}")


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
