"""Folders that need more than a name: mount points, and the eyes of another user."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

import slm_plugin

ROOT = hasattr(os, "geteuid") and os.geteuid() == 0
NOBODY = 65534


def mount(*arguments: str | Path) -> None:
    """Mount, or skip the test."""
    if not ROOT:
        pytest.skip("only root can mount")
    done = subprocess.run(["mount", *map(str, arguments)], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("nothing can be mounted here")


@pytest.fixture
def mount_point(tmp_path: Path) -> Iterator[Path]:
    """An empty folder on a disk of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m", "none", folder)
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=False)


@pytest.fixture
def bound(tmp_path: Path) -> Iterator[Callable[[Path], Path]]:
    """Shows a folder under a second path."""
    made = []

    def bind(folder: Path) -> Path:
        made.append(tmp_path / f"bound-{len(made)}")
        made[-1].mkdir()
        mount("--bind", folder, made[-1])
        return made[-1]

    yield bind
    for path in made:
        subprocess.run(["umount", "-l", str(path)], check=False)


def as_nobody(do: Callable[[], str]) -> str:
    """What a function returns, or the message of its error, when a user without rights calls it."""
    if not ROOT:
        pytest.skip("only root can become another user")
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setgid(NOBODY)
            os.setuid(NOBODY)
            said = do()
        except BaseException as error:
            said = f"{type(error).__name__}: {error}"
        with suppress(OSError):
            os.write(writer, said.encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        said = pipe.read().decode()
    os.waitpid(pid, 0)
    return said


def script(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own that runs code with ``claim`` and ``Path`` at hand."""
    head = "import sys\nfrom pathlib import Path\nfrom slm_plugin.outputs.claim import claim\n"
    return subprocess.Popen(
        [sys.executable, "-c", head + code, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(slm_plugin.__file__).parents[1])},
    )
