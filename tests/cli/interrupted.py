"""Interrupt a tiny run in a process of its own and say what it left; ``python -m`` runs many."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from tests.tiny import make_checkpoint, random_tokens

PROMISE = "error: interrupted; nothing was written\n"
RECIPE = """\
version: 1
model: {{id: {folder}/model, dtype: float32, device: cpu}}
calibration: {{source: {folder}/ids.json}}
stages:
  - prune: slm
    target: {{layers_removed: 3}}
export:
  - checkpoint: {{}}
output: {folder}/out
"""
# Runs the command line after code that gets hold of one of its moments.
PREAMBLE = """\
import os, signal, sys, time
sys.argv = ["slm-plugin", "run", {recipe!r}]
def now(signum={signum}):
    os.kill(os.getpid(), signum)
    time.sleep(0.3)
{moment}
from slm_plugin.cli import main
main()
"""


@dataclass(frozen=True, slots=True)
class Left:
    """What a run left.

    Attributes:
        code: Exit code.
        error: What it said on standard error.
        files: Names beside the output and in the temporary folder that were not there before.
        processes: Processes that still name the run's folder.
    """

    code: int
    error: str
    files: tuple[str, ...]
    processes: tuple[str, ...]


def prepare(folder: Path) -> Path:
    """A tiny model, its calibration set and a recipe; the recipe's path."""
    make_checkpoint(folder / "model", num_hidden_layers=8)
    (folder / "ids.json").write_text(str(random_tokens(6, 24).tolist()))
    (folder / "tmp").mkdir()
    recipe = folder / "recipe.yaml"
    recipe.write_text(RECIPE.format(folder=folder))
    return recipe


def interrupt_at(recipe: Path, signum: int, moment: str) -> Left:
    """Run until code that a moment's preamble hooks into sends the signal, by ``now()``."""
    code = PREAMBLE.format(recipe=str(recipe), signum=int(signum), moment=moment)
    process = _start(recipe, ["-c", code])
    return _left(recipe, process)


def interrupt_after(recipe: Path, signum: int, seconds: float, *, again: bool = False) -> Left:
    """Run and send the signal after a while, or twice."""
    process = _start(recipe, ["-m", "slm_plugin", "run", str(recipe)])
    time.sleep(seconds)
    for _ in range(2 if again else 1):
        process.send_signal(signum)
        time.sleep(0.02)
    return _left(recipe, process)


def _start(recipe: Path, arguments: list[str]) -> subprocess.Popen[str]:
    folder = recipe.parent
    environment = {
        **os.environ,
        "TMPDIR": str(folder / "tmp"),
        "SLM_PLUGIN_CACHE": str(folder / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )


def _left(recipe: Path, process: subprocess.Popen[str]) -> Left:
    _, error = process.communicate(timeout=120)
    folder = recipe.parent
    known = {"model", "ids.json", "recipe.yaml", "tmp", "cache"}
    names = {path.name for path in folder.iterdir()} - known
    names |= {f"tmp/{path.name}" for path in (folder / "tmp").iterdir()}
    return Left(process.returncode, error, tuple(sorted(names)), _processes(str(folder)))


def _processes(marker: str) -> tuple[str, ...]:
    """Command lines that hold the marker, where the system shows them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        # A shell or a test session that was started with the folder's name is no child of ours.
        if marker in line and "slm_plugin" in line and path.parent.name != str(os.getpid()):
            found.append(line)
    return tuple(found)


def main(count: int) -> None:
    """Interrupt as often at random moments and print what was not as promised."""
    wrong = 0
    generator = random.Random(1234)
    with tempfile.TemporaryDirectory() as scratch:
        recipe = prepare(Path(scratch))
        started = time.perf_counter()
        process = _start(recipe, ["-m", "slm_plugin", "run", str(recipe)])
        process.communicate()
        whole = time.perf_counter() - started
        shutil.rmtree(recipe.parent / "out")
        for number in range(count):
            signum = (signal.SIGINT, signal.SIGTERM)[number % 2]
            after = generator.uniform(0.1, whole)
            left = interrupt_after(recipe, signum, after)
            # On a machine that is busy with other things a run may end before its signal.
            finished = left.files == ("out",) and (not left.code or "complete" in left.error)
            if finished:
                shutil.rmtree(recipe.parent / "out")
            elif left != Left(128 + signum, left.error, (), ()) or PROMISE not in left.error:
                wrong += 1
                sys.stdout.write(f"{signum.name} after {after:.2f} s of {whole:.2f}: {left}\n")
                sys.stdout.flush()
    sys.stdout.write(f"{count} interruptions, {wrong} not as promised\n")


if __name__ == "__main__":
    main(int(sys.argv[1]))
