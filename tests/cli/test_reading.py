"""What the commands that tell print of foreign text."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest

from slm_plugin.cli import app as printing
from slm_plugin.cli import border, commands
from slm_plugin.inspection import component_table, inspection_table
from slm_plugin.report.before_after import summary_table
from slm_plugin.report.table import terminal
from tests.report import sample_plans, samples

EVIL = "\x1b[31m\x1b]0;title\x07\b[red]x[/] [link=http://x]y[/link]\nTarget: none\u202e\x9b\x7f"


def harmless(text: str) -> bool:
    """Whether nothing acts on a terminal but line breaks."""
    return not any(unicodedata.category(c) in ("Cc", "Cf", "Cs") and c != "\n" for c in text)


@pytest.fixture
def plan(tmp_path: Path) -> Path:
    """A plan with escape sequences, markup and line breaks wherever it holds text."""
    made = sample_plans.depth_plan()
    evil = made.model_copy(
        update={
            "pruner": EVIL,
            "options": {EVIL: EVIL, "list": [EVIL]},
            "notes": (EVIL,),
            "warnings": (EVIL,),
            "fingerprint": made.fingerprint.model_copy(
                update={"architecture": EVIL, "dtype": EVIL, "weights": EVIL}
            ),
        }
    )
    path = tmp_path / "plan.json"
    evil.write(path)
    return path


def test_nothing_of_a_plan_acts_on_a_terminal(
    plan: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is shown, on its own line; JSON reads back as it was."""
    assert border.border(lambda: commands.app(["explain", str(plan)], standalone_mode=False)) == 0
    shown = capsys.readouterr().out
    assert harmless(shown) and r"\x1b]0;title\x07\x08[red]x[/] [link=http://x]y[/link]\n" in shown
    targets = [line for line in shown.splitlines() if line.startswith("Target:")]
    assert targets == ["Target: threshold 0.9."]
    call = ["explain", str(plan), "--json"]
    assert border.border(lambda: commands.app(call, standalone_mode=False)) == 0
    text = capsys.readouterr().out
    assert harmless(text) and text.isascii()
    assert json.loads(text)["pruner"] == EVIL


@pytest.mark.parametrize("width", [1, 20, 1000])
def test_no_table_lets_a_name_act(
    width: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reports, components, inspections: markup is text, control characters are written out."""
    option = {"name": EVIL, "default": EVIL, "description": EVIL}
    row = {"kind": "pruner", "name": EVIL, "summary": EVIL, "ready": False, "extra": EVIL}
    dims = sample_plans.ORIGINAL.model_dump() | {"architecture": EVIL}
    family = {"residual": EVIL, "kinds": {EVIL: 1}, "fixed_layers": 1}
    found = {"dimensions": dims, "parameters": {"head": 1}, "units": {}, "family": family}
    report, _ = samples.nasty(EVIL)
    tables = (
        component_table([{**row, "options": [option], "targets": [EVIL]}]),
        inspection_table(EVIL, found),
        terminal(summary_table(report), wrap=False),
    )
    plain = printing.PlainConsole
    monkeypatch.setattr(printing, "PlainConsole", lambda **_: plain(width=width))
    for table in tables:
        printing.print_out(table)
        shown = capsys.readouterr().out
        assert harmless(shown)
        assert width < 1000 or ("[red]x[/]" in shown and "[link=http://x]y[/link]" in shown)


def test_a_line_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A line break in a path is shown as one."""
    printing.print_line(f"Everything lies in {EVIL}")
    shown = capsys.readouterr().out
    assert harmless(shown) and shown.count("\n") == 1
