"""The page of a comparison: whole, sortable, and closed to everything but its own script."""

from __future__ import annotations

import base64
import hashlib
import re

import pytest

from slm_plugin.comparison.page import markdown_table, render_comparison
from tests.comparison.sample import make_comparison
from tests.report.test_page import read


@pytest.fixture(scope="module")
def page() -> str:
    """The sample's page, with pictures."""
    pytest.importorskip("matplotlib")
    return render_comparison(make_comparison())


def table(page: str) -> list[list[str]]:
    """The values by which the rows sort, column by column."""
    body = re.search(r"<tbody>(.*?)</tbody>", page, flags=re.DOTALL)
    assert body is not None
    return [
        re.findall(r'data-value="([^"]*)"', row)
        for row in re.findall(r"<tr.*?</tr>", body[1], re.S)
    ]


def test_the_table_holds_every_row_and_sorts_by_every_column(page: str) -> None:
    """A value in each cell: numbers as JavaScript reads them, empty where there is none."""
    values = table(page)
    kinds = re.findall(r'<th[^>]*data-kind="(\w+)"', page)
    assert len(values) == 6
    assert all(len(row) == len(kinds) == 14 for row in values)
    numbers = [n for n, kind in enumerate(kinds) if kind == "number"]
    assert len(numbers) == 10
    for row in values:
        for n in numbers:
            assert row[n] in ("", "Infinity") or float(row[n]) >= 0
    assert [row[5] for row in values] == ["24.15", "40.0", "35.0", "300.0", "Infinity", ""]
    assert values[5][-1] == "the score of layer 3 is &lt;NaN&gt;"


def test_heads_say_which_direction_is_better(page: str) -> None:
    """The first click on a head shows the best first."""
    heads = dict(
        (name, better)
        for better, name in re.findall(r'<th[^>]*data-better="(\w*)">([^<]*)</th>', page)
    )
    assert heads["perplexity text 128"] == "lower"
    assert heads["decode speed (tokens/s)"] == "higher"
    assert heads["layers removed"] == ""


def test_strings_are_no_markup_and_tags_nest(page: str) -> None:
    """Labels, titles and errors are text."""
    reader = read(page)
    assert "i" not in reader.tags
    assert "<i>sleb</i>" in reader.text and "depth & <width>" in reader.text
    ids = [value for name, value in reader.attributes if name == "id"]
    assert len(ids) == len(set(ids))


def test_only_the_pages_own_script_may_run(page: str) -> None:
    """The policy admits the one script by its hash, and nothing is asked for from outside."""
    scripts = re.findall(r"<script>(.*?)</script>", page, flags=re.DOTALL)
    assert len(scripts) == page.count("<script") == 1
    digest = base64.b64encode(hashlib.sha256(scripts[0].encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    assert f'content="{policy}"' in page
    assert "fetch" not in scripts[0] and not re.search(r'(?:src|href)="(?!#)', page)


def test_quality_is_drawn_against_size_and_speed(page: str) -> None:
    """Perplexity and the mean over tasks, each twice."""
    titles = re.findall(r"<h4>(.*?)</h4>", page)
    assert titles == [
        f"{quality} against {cost}"
        for quality in ("perplexity text 128", "zero-shot mean")
        for cost in ("parameters", "decode speed (tokens/s)")
    ]


@pytest.mark.usefixtures("no_matplotlib")
def test_without_matplotlib_the_page_says_so() -> None:
    """Notices stand where the pictures would."""
    assert render_comparison(make_comparison()).count('class="notice"') == 4


def test_the_markdown_table_is_whole() -> None:
    """As many cells in every row, the best in bold, nothing that Markdown would take for markup."""
    text = markdown_table(make_comparison())
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 8
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {15}
    assert "| **35** |" in lines[4] and "<i>" not in text
