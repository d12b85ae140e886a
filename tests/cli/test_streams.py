"""What a terminal or a pipe cannot take never decides how a command ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")

NAMES = "…\u2013±\xd7→─│┏█⠋模\ud800 \x1b[1m[red]x[/]"
# A command that prints all kinds of characters by all the ways there are.
PRINTING = """
import sys, warnings
from slm_plugin import cli
from slm_plugin.cli import app, commands, outcome
from rich.table import Table
def work(**_):
    {before}
    from slm_plugin.progress import counting, say, track
    name = {name!a}
    say(name)
    for _ in track([1], name): pass
    with counting(name) as count: count()
    table = Table(title=name); table.add_column(name); table.add_row(name)
    app.print_out(table)
    app.print_line(name)
    print(name * 2000, file=sys.stderr)
    warnings.warn(name)
commands.app = work
cli.main()
"""


def printing(redirection: str = "", before: str = "pass", **environment: str) -> tuple[int, str]:
    """Exit code and all that was printed, in a shell that redirects."""
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirection}; exit ${{PIPESTATUS[0]}}', "bash", sys.executable, "-c",
         PRINTING.format(name=NAMES, before=before)],
        capture_output=True,
        check=False,
        env={**os.environ, **environment},
    )  # fmt: skip
    shown = done.stdout + done.stderr
    assert b"Traceback" not in shown and b"Exception ignored" not in shown, shown
    return done.returncode, shown.decode("utf-8", "backslashreplace")


@pytest.mark.parametrize(
    "environment",
    [
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
        {"PYTHONIOENCODING": "cp1252"},
        {"PYTHONIOENCODING": "idna"},
        {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
        {"LANG": "C", "PYTHONUTF8": "0"},
        {"FORCE_COLOR": "1", "TERM": "dumb"},
        {"FORCE_COLOR": "1", "PYTHONIOENCODING": "ascii"},
        {"FORCE_COLOR": "1", "COLUMNS": "1", "NO_COLOR": "1"},
        {"FORCE_COLOR": "1", "COLUMNS": "0"},
        {"COLUMNS": "99999999999"},
    ],
    ids=str,
)
def test_any_encoding_and_any_width_will_do(environment: dict[str, str]) -> None:
    """What it does not have is replaced, and the command succeeds."""
    assert printing(**environment)[0] == 0


@pytest.mark.parametrize(
    "redirection",
    [">&-", "2>&-", ">&- 2>&-", "<&-", "<&- >&- 2>&-", "| true", "2>&1 | true", "| head -1",
     "2> /dev/full", "2> >(true)"],
)  # fmt: skip
def test_a_stream_that_nobody_reads_changes_nothing(redirection: str) -> None:
    """Closed by the parent, a reader that left, messages that find no room: all is well."""
    assert printing(redirection)[0] == 0


@pytest.mark.parametrize(
    "close", ["sys.stdout.close()", "sys.stderr.close()", "sys.stdout.buffer.close()",
              "sys.stdout.buffer.raw.close()", "sys.stdout.detach()"]
)  # fmt: skip
def test_a_stream_that_a_library_closes_stays_open(close: str) -> None:
    """What comes later is printed all the same."""
    code, said = printing(before=close)
    assert code == 0
    assert said.count("[red]x[/]") == printing()[1].count("[red]x[/]")


def test_results_that_find_no_room_are_an_error() -> None:
    """Nobody else has them; a folder that was written is a result of its own."""
    code, shown = printing("> /dev/full")
    assert (code, "error: cannot write to standard output: No space left" in shown) == (1, True)
    assert printing("> /dev/full 2> /dev/full")[0] == 1
    code, shown = printing("> /dev/full", "outcome.await_folder(__import__('pathlib').Path('x'))")
    assert (code, "warning: the summary could not be printed" in shown) == (0, True)


def test_files_never_take_the_number_of_a_closed_stream() -> None:
    """A C library that writes to number 2 does not write into a checkpoint."""
    before = "assert open('/dev/null').fileno() > 2"
    assert printing("<&- >&- 2>&-", before)[0] == 0


def test_names_are_shown_as_they_are() -> None:
    """Markup is text, escape sequences are visible, by every way of printing."""
    _, shown = printing(PYTHONIOENCODING="utf-8")
    assert shown.count(r"\ud800 \x1b[1m[red]x[/]") >= 3
