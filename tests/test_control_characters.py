"""Foreign text is shown, whatever characters it has."""

from __future__ import annotations

import json
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slm_plugin.control_characters import visible


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x9b2J\x7f\x08", r"\x9b2J\x7f\x08"),
        ("a\nb\r\tc", r"a\nb\r\tc"),
        ("\u202egnp.exe\u200b\ufeff\u2028", r"\u202egnp.exe\u200b\ufeff\u2028"),
        ("\U000e0041\udc80", r"\U000e0041\udc80"),
        ("[red]Zoë 模型 […]\xa0[/]", "[red]Zoë 模型 […]\xa0[/]"),
    ],
)
def test_what_acts_is_written_out(text: str, shown: str) -> None:
    """Escape sequences, what is invisible, what turns the direction; letters stay."""
    assert visible(text) == shown


@given(st.text(st.characters(categories=["C", "Z", "L", "P"])))
def test_nothing_acts_and_twice_is_once(text: str) -> None:
    """No control or format character is left; nothing is escaped again."""
    shown = visible(text)
    assert not {"Cc", "Cf", "Cs", "Zl", "Zp"} & {unicodedata.category(char) for char in shown}
    assert visible(shown) == shown
    assert json.loads(json.dumps(shown)) == shown
