"""Text in Markdown means only itself: judged by a Markdown parser."""

from __future__ import annotations

import pytest
from markdown_it import MarkdownIt

from slm_plugin.report import markdown

PARSER = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
NASTY = [
    "plain",
    "<script>alert(1)</script>",
    "a & b &lt; c",
    "*bold* _italic_ __strong__ ~~gone~~ snake_case",
    "[link](http://evil.example) ![image](http://evil.example/x.png)",
    "<http://evil.example>",
    "`code` ``more``",
    "\\ \\* \\",
    "---",
    "# heading",
    "- item",
    "+ item",
    "1. item",
    "12) item",
    "> quote",
    "two\n\nparagraphs\n```\nfence\n```",
    "cell | of a | table",
    "key: 'value' \"quoted\"",
    "{{ 7 * 7 }} {% raw %}",
    "===",
]


@pytest.mark.parametrize("text", NASTY)
@pytest.mark.parametrize("before", ["", "- ", "1. ", "words "])
def test_escaped_text_is_read_back_as_one_line_of_text(text: str, before: str) -> None:
    """Wherever it stands, the parser finds one run of text that says what was put in."""
    (inline,) = (t for t in PARSER.parse(before + markdown.escape(text)) if t.type == "inline")
    assert [child.type for child in inline.children or []] == ["text"]
    assert inline.content and (inline.children or [])[0].content.removeprefix("words ") == " ".join(
        text.split()
    )


@pytest.mark.parametrize("text", NASTY)
def test_escaped_text_stays_in_its_table_cell(text: str) -> None:
    """A table of two cells keeps two cells."""
    tokens = PARSER.parse(f"| a | b |\n| --- | --- |\n| {markdown.escape(text)} | x |\n")
    cells = [tokens[i + 1] for i, t in enumerate(tokens) if t.type == "td_open"]
    assert len(cells) == 2
    assert (cells[0].children or [])[0].content == " ".join(text.split())


@pytest.mark.parametrize("text", [*NASTY, "`", "``", "a`", "````x"])
def test_code_spans_hold_their_text(text: str) -> None:
    """A span of code is one token with the text, also in a table cell."""
    tokens = PARSER.parse(f"| a |\n| --- |\n| {markdown.code(text)} |\n")
    cell = next(tokens[i + 1] for i, t in enumerate(tokens) if t.type == "td_open")
    assert [(c.type, c.content) for c in cell.children or []] == [
        ("code_inline", " ".join(text.split()))
    ]


@pytest.mark.parametrize("text", ["plain", "```\n# out\n```", "````", "---\na: 1"])
def test_fences_cannot_be_left(text: str) -> None:
    """A block of code ends where it is meant to."""
    (token,) = PARSER.parse(markdown.fence(text, "yaml"))
    assert (token.type, token.info, token.content) == ("fence", "yaml", text + "\n")


def test_markdown_is_not_escaped_twice() -> None:
    """What is Markdown by type passes unchanged."""
    assert markdown.escape(markdown.code("a*b")) == "`a*b`"
