"""Foreign text, such as a name in a recipe or a plan, made fit to be printed."""

from __future__ import annotations

import unicodedata

_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}
# Control and format characters (escape sequences, bidirectional overrides, what has no width),
# halves of surrogate pairs, and the separators that end a line.
_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def visible(text: object, *, keep: str = "") -> str:
    r"""The text with every character that acts instead of showing written out, as in ``\x1b``.

    A terminal obeys such characters: a model's name could hide a line, colour it or retitle the
    window. Everything that any command prints goes through here.

    Args:
        text: Anything; its ``str`` is taken.
        keep: Characters that stay as they are, such as the line breaks of our own layout.
    """
    shown = str(text)
    if shown.isprintable():
        return shown
    return "".join(
        _written_out(char)
        if char not in keep and unicodedata.category(char) in _CATEGORIES
        else char
        for char in shown
    )


def _written_out(char: str) -> str:
    code = ord(char)
    if char in _SHORT:
        return _SHORT[char]
    if code < 0x100:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
