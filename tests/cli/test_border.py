"""The command line says what went wrong in one line, whatever it was."""

from __future__ import annotations

import errno
import json
import subprocess
import sys
import zipfile

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from safetensors import SafetensorError

from slm_plugin import interruption
from slm_plugin.cli import border, main
from slm_plugin.errors import NumericalError, OutputError, RecipeError


def raised(error: BaseException) -> None:
    """Raise it."""
    raise error


def system(number: int, name: object = "/models/x") -> OSError:
    """An error of the system about a file."""
    return OSError(number, "Said the system", name)


def deep() -> None:
    """Recurse without an end."""
    deep()


CASES = [
    (lambda: torch.empty(10**15), 1, "out of memory"),
    (lambda: raised(MemoryError()), 1, "out of memory"),
    (lambda: raised(torch.OutOfMemoryError("CUDA out of memory.")), 1, "out of memory"),
    (lambda: raised(OSError(errno.ENOMEM, "Cannot allocate memory")), 1, "out of memory"),
    (lambda: raised(RuntimeError("std::bad_alloc")), 1, "out of memory"),
    (lambda: raised(OutputError("no room in x", hint="free some")), 2, "no room in x"),
    (lambda: raised(NumericalError("NaN in y")), 1, "NaN in y"),
    (lambda: raised(OutputError("")), 2, "OutputError"),
    (lambda: raised(KeyboardInterrupt()), 130, "interrupted; nothing was written"),
    (lambda: raised(ValueError("a\nb")), 1, "internal error: ValueError: a"),
    (lambda: raised(ValueError()), 1, "internal error: ValueError: ValueError"),
    (lambda: raised(SystemExit(0)), 1, "a library wanted to end the process with 0"),
    (lambda: raised(SystemExit()), 1, "a library wanted to end the process"),
    (lambda: raised(GeneratorExit()), 1, "a library wanted to end the process"),
    (deep, 2, "nested too deeply"),
    (lambda: torch.empty(2**62, 8), 1, "out of memory"),
    (lambda: torch.ones(1).mul_(10**400), 2, "too large to compute with"),
    (lambda: raised(system(errno.ENOSPC)), 1, "the disk is full: Said the system: /models/x"),
    (lambda: raised(OSError(errno.ENOSPC, "No space left on device", "f")), 1, "the disk is full"),
    (lambda: raised(SafetensorError("IoError(Os { code: 28, No space left })")), 1, "disk is full"),
    (lambda: raised(OSError(errno.EMFILE, "Too many open files")), 1, "too many files are open"),
    (lambda: raised(system(errno.EACCES)), 2, "Said the system: /models/x"),
    (lambda: raised(system(errno.ENOENT, b"/models/\xff")), 2, "/models/\\udcff"),
    (lambda: raised(system(errno.EIO)), 1, "Said the system: /models/x"),
    (lambda: b"\xff".decode(), 2, "cannot be read or written in its encoding"),
    (lambda: "\udc80".encode(), 2, "cannot be read or written in its encoding"),
    (lambda: yaml.safe_load("{"), 2, "this is not valid YAML"),
    (lambda: json.loads("{"), 2, "this is not valid JSON"),
    (lambda: TypeAdapter(dict[str, int]).validate_python({"a": "b"}), 2, "schema: a: Input"),
    (lambda: raised(SafetensorError("header too large")), 1, "a file is damaged or cut short"),
    (lambda: raised(zipfile.BadZipFile("no zip")), 1, "a file is damaged or cut short"),
    (lambda: raised(EOFError()), 1, "a file is damaged or cut short"),
    (lambda: torch.empty(1, device="cuda:77"), 1, "the device failed"),
    (lambda: raised(RuntimeError("CUDA error: device-side assert")), 1, "the device failed"),
    (lambda: raised(ConnectionResetError("reset by peer")), 1, "the network failed"),
    (lambda: raised(TimeoutError("too long")), 1, "timed out: too long"),
    (lambda: raised(ModuleNotFoundError("No module named 'x'")), 1, "cannot be imported"),
    (lambda: raised(subprocess.CalledProcessError(3, "pip")), 1, "a child process failed"),
]


@pytest.mark.parametrize(("work", "code", "said"), CASES, ids=range(len(CASES)))
def test_every_failure_is_one_line(
    work: object, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error line that names the fault, an exit code for its kind, and no traceback."""
    assert callable(work)
    found = border.border(work)
    shown = capsys.readouterr()
    first, *others = shown.err.splitlines()
    assert first.startswith("error: ") and said in first
    assert all(line.startswith("hint: ") for line in others)
    assert (found, shown.out) == (code, "")


def test_a_message_of_several_lines_has_a_prefix_on_each(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Empty lines are left out; what a terminal would obey is written out."""
    border.border(lambda: raised(RecipeError("a\x1b[2J\n\nb\r\u202ec\x85d", hint="e\x07\nf")))
    assert capsys.readouterr().err.splitlines() == [
        r"error: a\x1b[2J",
        r"error: b\r\u202ec\x85d",
        r"hint: e\x07",
        "hint: f",
    ]


def test_a_signal_explains_whatever_came_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error that a library made of the interruption is not told as an error."""
    monkeypatch.setattr(interruption, "_state", interruption._State(signum=15))
    with pytest.raises(interruption.Interrupted) as caught:
        border.border(lambda: raised(ImportError("numpy.core.multiarray failed to import")))
    assert caught.value.exit_code == 143


def test_a_trace_is_shown_when_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It comes before the message, and the exit code stays."""
    monkeypatch.setenv("SLM_PLUGIN_TRACEBACK", "1")
    assert border.border(lambda: raised(ValueError("x"))) == 1
    shown = capsys.readouterr().err
    assert "Traceback" in shown and shown.splitlines()[-2] == "error: internal error: ValueError: x"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["rum"], "error: No such command 'rum'."),
        (["[red]x[/]\x1b[1m"], "error: No such command '[red]x[/]\\x1b[1m'."),
        (["list", "--jason"], "error: No such option: --jason"),
        (["explain"], "error: Missing argument"),
        (["apply", "p", "--model", "m", "--output", "o", "--upto", "0"], "error: Invalid value"),
    ],
)
def test_a_wrong_call_shows_the_usage(
    arguments: list[str],
    told: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Usage, the error in our form, where the help is; exit code 2."""
    monkeypatch.setattr(sys, "argv", ["slm-plugin", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    usage, error, hint = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert usage.startswith("Usage: slm-plugin") and error.startswith(told)
    assert hint.startswith("hint: see `slm-plugin")
