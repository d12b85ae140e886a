"""Text put into Markdown so that it means only itself, whatever it holds."""

from __future__ import annotations

import re

from slm_plugin.control_characters import visible

_LAYOUT = "\n\t"


class Markdown(str):
    """Text that is Markdown already and is not escaped again."""

    __slots__ = ()


def escape(value: object) -> str:
    """One line of plain text: no HTML, no markup, no table or heading of its own."""
    if isinstance(value, Markdown):
        return value
    text = visible(" ".join(str(value).split()))
    text = re.sub(r"([\\`*\[\]|~])", r"\\\1", text)
    # Within a word an underscore means nothing: `torch_pruning` stays readable.
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
    text = re.sub(r"^([-+=#])(?=[\s\-+=#]|$)", r"\\\1", text)
    text = re.sub(r"^(\d+)([.)])(?=\s|$)", r"\1\\\2", text)
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def code(text: str) -> Markdown:
    """An inline code span, fit for a table cell."""
    line = visible(" ".join(text.split())).replace("|", r"\|")
    ticks = "`" * (_longest_run(line) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") else ""
    return Markdown(f"{ticks}{pad}{line}{pad}{ticks}")


def fence(text: str, language: str = "") -> Markdown:
    """A code block whose fence is longer than anything like one inside it."""
    ticks = "`" * max(3, _longest_run(text) + 1)
    return Markdown(f"{ticks}{language}\n{visible(text, keep=_LAYOUT).rstrip()}\n{ticks}")


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)
