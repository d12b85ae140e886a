"""Try to make the command line lose files, run code or fail without a word, and count.

Every row of the table is one kind of trouble. The command runs as a process of its own, as a user
runs it, on a tiny random model (``--real``: on the default one).

    python benchmarks/reliability.py                     # every kind, about 90 minutes
    python benchmarks/reliability.py --only races --count 5
    python benchmarks/reliability.py --only kills --real --count 10

Killed runs, races and full disks happen beside an older result: it must be at its place after the
next start, and the run must end with the same bytes when it is started again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
COMMAND = [str(Path(sys.executable).with_name("slm-plugin"))]
# Starts a command as an account that has no name, no home folder and no files.
ACCOUNT = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
# Kills the process before or after the Nth rename, counted over the two functions that rename.
DIE_AT_RENAME = """\
import os, signal, sys
left = int(sys.argv.pop(1))
def dying(function):
    def call(*arguments, **named):
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*arguments, **named)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result
    return call
os.rename, os.replace = dying(os.rename), dying(os.replace)
from slm_plugin.__main__ import main
main()
"""
RECIPE = """\
version: 1
model: {{id: {model}, dtype: float32, device: cpu}}
calibration: {calibration}
seed: {seed}
stages:
  - prune: block_influence
    target: {{layers_removed: 1}}
  - prune: torch_pruning
    target: {{ratio: 0.05}}
    importance: magnitude
    kv_groups: 0
  - recover: refit
export:
  - checkpoint: {{}}
output: {output}
"""


@dataclass
class Row:
    """What happened to one kind of trouble.

    Attributes:
        refused: Ended with exit code 2 and a message.
        worked: Ended as it should otherwise: done, interrupted or a failed run that says why.
        wrong: Inputs after which something was not as it should be, in a line each.
        internal: Internal errors and tracebacks.
        lost: Files of a user or of an older result that were gone or changed.
        ran: Times that code of an input was run.
    """

    kind: str
    tried: int = 0
    refused: int = 0
    worked: int = 0
    internal: int = 0
    lost: int = 0
    ran: int = 0
    wrong: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Bench:
    """A folder with a model and its recipes.

    Attributes:
        folder: Everything lies below it; ``tmp`` is the temporary folder of all runs.
        model: What recipes call the model.
        count: How often a random trouble is repeated.
    """

    folder: Path
    model: str
    count: int
    calibration: str

    @property
    def output(self) -> Path:
        """The output folder of all recipes."""
        return self.folder / "work" / "out"

    @property
    def scratch(self) -> Path:
        """The temporary folder of all runs."""
        return self.folder / "tmp"

    def recipe(self, seed: int, output: Path | str | None = None, *, short: bool = False) -> Path:
        """Write a recipe whose result depends on the seed; a short one exports nothing."""
        path = self.folder / f"recipe-{seed}.yaml"
        text = RECIPE.format(
            model=json.dumps(self.model),
            calibration=self.calibration.format(seed=seed),
            seed=seed,
            output=json.dumps(str(self.output if output is None else output)),
        )
        path.write_text(text.replace("export:\n  - checkpoint: {}\n", "") if short else text)
        return path

    def start(
        self, *arguments: str, command: list[str] | None = None, **environment: str
    ) -> subprocess.Popen[str]:
        """Start the command in a folder of its own."""
        (self.folder / "work").mkdir(exist_ok=True)
        self.scratch.mkdir(exist_ok=True)
        return subprocess.Popen(
            [*(command or COMMAND), *arguments],
            cwd=self.folder / "work",
            env={
                **os.environ,
                "TMPDIR": str(self.scratch),
                "HF_HUB_OFFLINE": "1",
                "PYTHONPATH": str(ROOT),
                **environment,
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )


def ended(process: subprocess.Popen[str], row: Row, label: str) -> tuple[int, str]:
    """Exit code and all output of a process; internal errors are counted."""
    out, err = process.communicate(timeout=900)
    said = out + err
    if "internal error" in said or "Traceback" in said:
        row.internal += 1
        row.wrong.append(f"{label}: {said.strip().splitlines()[-1]}")
    return process.returncode, said


def digest(folder: Path, *, timed: bool = True) -> str:
    """SHA-256 over the names and bytes of all files of a folder; empty when there is none.

    Args:
        folder: The folder.
        timed: Include the report and its page, which hold times.
    """
    if not folder.is_dir():
        return ""
    total = hashlib.sha256()
    for file in sorted(folder.rglob("*")):
        if file.is_file() and (timed or file.parent != folder or file.name.startswith("plan-")):
            total.update(f"{file.relative_to(folder)}\n".encode() + file.read_bytes())
    return total.hexdigest()


def leavings(bench: Bench) -> list[str]:
    """What lies beside the output folder or in the temporary folder, and should not."""
    beside = [path.name for path in bench.output.parent.iterdir() if path != bench.output]
    # PyTorch keeps an empty folder of its own there.
    ours = (p.name for p in bench.scratch.iterdir() if not p.name.startswith("torchinductor"))
    return beside + [f"tmp/{name}" for name in ours]


def reference(bench: Bench, row: Row) -> tuple[str, str, float]:
    """Digests of the older result and of what the run makes, and the seconds of that run."""
    code, said = ended(bench.start("run", str(bench.recipe(1)), "--overwrite"), row, "first")
    assert code == 0, said
    kept = bench.folder / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(bench.output, kept, symlinks=True)
    started = time.perf_counter()
    code, said = ended(bench.start("run", str(bench.recipe(2)), "--overwrite"), row, "second")
    assert code == 0, said
    seconds = time.perf_counter() - started
    wanted = digest(bench.output, timed=False)
    restore(bench)
    return digest(bench.output), wanted, seconds


def restore(bench: Bench) -> None:
    """Put the older result back."""
    shutil.rmtree(bench.output, ignore_errors=True)
    shutil.copytree(bench.folder / "kept", bench.output, symlinks=True)


def after_death(bench: Bench, row: Row, label: str, old: str, wanted: str) -> None:
    """Check that the older result or the new one is whole, then run again to the end."""
    there = digest(bench.output)
    if there != old and digest(bench.output, timed=False) != wanted:
        # Died between the renames: the next start, even one that is refused, puts it back.
        ended(bench.start("run", str(bench.recipe(2))), row, f"{label}, next start")
        there = digest(bench.output)
        if there != old:
            row.lost += 1
            row.wrong.append(f"{label}: the older result is gone")
    code, said = ended(bench.start("run", str(bench.recipe(2)), "--overwrite"), row, label)
    if code or digest(bench.output, timed=False) != wanted:
        row.wrong.append(f"{label}: started again: exit {code}, other bytes or none: {said[-300:]}")
    elif leavings(bench):
        row.wrong.append(f"{label}: left {leavings(bench)}")
    else:
        row.worked += 1
    restore(bench)


def kills(bench: Bench) -> Iterator[Row]:
    """SIGKILL at random moments, and before and after every rename."""
    row = Row("killed at a random moment, then run again")
    old, wanted, seconds = reference(bench, row)
    draw = random.Random(0)
    for number in range(bench.count):
        delay = draw.uniform(0, seconds)
        process = bench.start("run", str(bench.recipe(2)), "--overwrite")
        time.sleep(delay)
        process.kill()
        process.communicate()
        row.tried += 1
        after_death(bench, row, f"kill {number} at {delay:.2f} s", old, wanted)
    yield row
    row = Row("killed before and after every rename")
    for moment in range(1, 200):
        command = [sys.executable, "-c", DIE_AT_RENAME, str(moment)]
        process = bench.start("run", str(bench.recipe(2)), "--overwrite", command=command)
        code, _ = ended(process, row, f"rename {moment}")
        if code == 0:
            break
        row.tried += 1
        after_death(bench, row, f"rename {moment}", old, wanted)
    yield row


def signals(bench: Bench) -> Iterator[Row]:
    """SIGINT and SIGTERM at random moments: the code, the line, no traceback, nothing left."""
    row = Row("SIGINT or SIGTERM at a random moment")
    old, _, seconds = reference(bench, row)
    draw = random.Random(1)
    for number in range(bench.count):
        # Before the first line of the package runs, the interpreter itself answers.
        delay = draw.uniform(0.15, seconds)
        sent, code = ((signal.SIGINT, 130), (signal.SIGTERM, 143))[number % 2]
        process = bench.start("run", str(bench.recipe(2)), "--overwrite")
        time.sleep(delay)
        process.send_signal(sent)
        found, said = ended(process, row, f"{sent.name} at {delay:.2f} s")
        row.tried += 1
        if found == 0:
            row.worked += 1
        elif found != code or "interrupted" not in said:
            row.wrong.append(f"{sent.name} at {delay:.2f} s: exit {found}: {said[-200:]}")
        elif digest(bench.output) != old:
            row.lost += 1
        elif leavings(bench):
            row.wrong.append(f"{sent.name} at {delay:.2f} s: left {leavings(bench)}")
        else:
            row.worked += 1
        restore(bench)
        shutil.rmtree(bench.scratch)
    yield row


def races(bench: Bench) -> Iterator[Row]:
    """Two processes with one output: one does the work, the other refuses at once."""
    row = Row("two processes, one output")
    recipe = str(bench.recipe(2, short=True))
    ended(bench.start("run", recipe), row, "first")
    wanted = digest(bench.output, timed=False)
    for number in range(bench.count):
        both = [bench.start("run", recipe, "--overwrite") for _ in range(2)]
        codes = sorted(ended(process, row, f"race {number}")[0] for process in both)
        row.tried += 1
        row.refused += codes == [0, 2]
        if codes != [0, 2] or digest(bench.output, timed=False) != wanted or leavings(bench):
            row.wrong.append(f"race {number}: exit codes {codes}, beside it {leavings(bench)}")
    yield row


@contextmanager
def small_disk(size: int, where: Path) -> Iterator[None]:
    """Mount a file system of so many bytes in memory; needs root."""
    where.mkdir(parents=True, exist_ok=True)
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where)]
    subprocess.run(mount, check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(where)], check=True)


def full_disk(bench: Bench) -> Iterator[Row]:
    """The disk of the output, of temporary files or of the cache fills up at ever later writes."""
    row = Row("disk full: output, temporary folder, cache")
    old, _, _ = reference(bench, row)
    kept = bench.folder / "kept"
    size = sum(file.stat().st_size for file in kept.rglob("*") if file.is_file())
    disk = bench.folder / "disk"
    for step in range(bench.count):
        spare = int(4096 + 3 * size * step / bench.count)
        with small_disk(2 * size + spare, disk):
            shutil.copytree(kept, disk / "out", symlinks=True)
            recipe = bench.recipe(2, disk / "out")
            code, said = ended(bench.start("run", str(recipe), "--overwrite"), row, f"+{spare}")
            row.tried += 1
            if code == 0:
                row.worked += 1
            elif digest(disk / "out") != old:
                row.lost += 1
                row.wrong.append(f"{spare} bytes spare: exit {code}, older result changed")
            elif code in (1, 2) and "No space left" in said:
                row.worked += 1
            else:
                row.wrong.append(f"{spare} bytes spare: exit {code}: {said[-300:]}")
    for variable in ("TMPDIR", "SLM_PLUGIN_CACHE"):
        for spare in (4096, 65536, 1 << 18):
            with small_disk(spare, disk):
                process = bench.start(
                    "run", str(bench.recipe(2)), "--overwrite", **{variable: str(disk)}
                )
                code, said = ended(process, row, f"{variable} of {spare}")
            row.tried += 1
            row.worked += code in (0, 1, 2)
            row.lost += code != 0 and digest(bench.output) != old
            restore(bench)
    yield row


def refused_early(said: str) -> bool:
    """Whether the refusal is about the output and came before any work."""
    return "output" in said and "stage 1" not in said


def outputs(bench: Bench) -> Iterator[Row]:
    """Outputs that must never be replaced, with ``--overwrite``; what lies there must stay."""
    row = Row("output folders that are not the tool's to replace")
    home = bench.folder / "home"
    for path, prepare in _outputs(bench, home):
        shutil.rmtree(home, ignore_errors=True)
        (home / "documents").mkdir(parents=True)
        (home / "documents" / "thesis.txt").write_text("years of work")
        prepare()
        before = digest(bench.folder / "home"), digest(bench.folder / "model")
        recipe = bench.recipe(3, path)
        process = bench.start("run", str(recipe), "--overwrite", HOME=str(home))
        code, said = ended(process, row, repr(path))
        row.tried += 1
        row.lost += before != (digest(bench.folder / "home"), digest(bench.folder / "model"))
        if code == 2 and refused_early(said):
            row.refused += 1
        else:
            row.wrong.append(f"output {path!r}: exit {code}: {said[-200:]}")
    yield row


def _outputs(bench: Bench, home: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    def nothing() -> None:
        return

    for path in (
        home,
        home / "documents",
        "~",
        "~/documents",
        "~nosuch/out",
        "/",
        "/usr",
        ".",
        "..",
    ):
        yield str(path), nothing
    for path in (
        "../work",
        "./.",
        bench.folder,
        bench.folder / "model",
        "a\0b",
        "",
        " ",
        "x" * 300,
    ):
        yield str(path), nothing
    for path in (bench.folder / "model" / "..", "/proc/out", "/dev/null", "/dev/full/out"):
        yield str(path), nothing
    yield "dangling", lambda: _link("missing", bench.folder / "work" / "dangling")
    yield "loop", lambda: _link("loop", bench.folder / "work" / "loop")
    yield "home-link", lambda: _link(str(home), bench.folder / "work" / "home-link")
    yield "to-model", lambda: _link(str(bench.folder / "model"), bench.folder / "work" / "to-model")
    yield "/".join(["d" * 200] * 30), nothing


def _link(target: str, link: Path) -> None:
    link.parent.mkdir(exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(target)


def places(bench: Bench) -> Iterator[Row]:
    """Outputs on mount points, on read-only disks and in folders of others; needs root.

    A mount point stays one and is filled in place. What cannot be written is refused before the
    model is loaded. A stranger's file on a mounted disk stays.
    """
    row = Row("mount points, read-only disks, no permission")
    _open_to_all(bench)
    disk = bench.folder / "disk"
    for label, options, held, user, code in PLACES:
        bench.scratch.mkdir(exist_ok=True)
        shutil.rmtree(disk, ignore_errors=True)
        with small_disk(64 << 20, disk):
            out = disk / "below" if "below" in label else disk
            out.mkdir(exist_ok=True)
            if "former" in held:
                done = bench.start("run", str(bench.recipe(1, out)), "--overwrite")
                assert ended(done, row, label)[0] == 0, label
            if "stranger" in held:
                (out / "thesis.txt").write_text("years of work")
            _give(out, user, mode=0o777 if "written" in label else 0o555)
            if options:
                subprocess.run(["mount", "-o", f"remount,{options}", str(disk)], check=True)
            before, inode = digest(out), out.stat().st_ino
            recipe = bench.recipe(2, out)
            recipe.chmod(0o644)
            command = [*(ACCOUNT if user else []), *COMMAND]
            process = bench.start("run", str(recipe), "--overwrite", command=command)
            found, said = ended(process, row, label)
            row.tried += 1
            lost = code == 2 and digest(out) != before
            row.lost += lost
            left = [path.name for path in out.iterdir() if "slm-plugin" in path.name]
            in_place = out.stat().st_ino == inode and left == [".slm-plugin.json"]
            if found != code or lost or (code == 2 and not refused_early(said)):
                row.wrong.append(f"{label}: exit {found}: {said[-300:]}")
            elif code == 2:
                row.refused += 1
            elif in_place and (out / "checkpoint" / "model.safetensors").is_file():
                row.worked += 1
            else:
                row.wrong.append(f"{label}: not filled in place, or left {left}")
    yield row


# What it is, how the disk is mounted again, what lies there, another account?, exit code.
PLACES = (
    ("empty mount point", "", "", False, 0),
    ("mount point with a former result", "", "former", False, 0),
    ("mount point with another's file", "", "stranger", False, 2),
    ("mount point with a former result and another's file", "", "former stranger", False, 2),
    ("read-only mount point", "ro", "", False, 2),
    ("read-only mount point with a former result", "ro", "former", False, 2),
    ("folder below a read-only disk", "ro", "", False, 2),
    ("folder below a read-only disk, former result", "ro", "former", False, 2),
    ("mount point that the account may not write", "", "", True, 2),
    ("mount point, written by another account", "", "", True, 0),
    ("folder below a folder that the account may not write", "", "", True, 2),
    ("folder below, former result, not writable", "", "former", True, 2),
)


def _give(folder: Path, user: bool, *, mode: int) -> None:
    """Set who may write a folder and all that lies in it."""
    if user:
        for path in (folder, *folder.rglob("*")):
            path.chmod(mode if path.is_dir() else mode & 0o666)


def _open_to_all(bench: Bench) -> None:
    """Let another account read and write the benchmark's folder."""
    bench.output.parent.mkdir(exist_ok=True)
    bench.scratch.mkdir(exist_ok=True)
    for path in (bench.folder, *bench.folder.rglob("*")):
        path.chmod(0o777 if path.is_dir() else 0o666)


def no_home(bench: Bench) -> Iterator[Row]:
    """A fresh account with no home folder and no name; needs root to become one."""
    row = Row("a fresh account without a home")
    _open_to_all(bench)
    account = [*ACCOUNT, *COMMAND]
    shutil.rmtree(bench.output, ignore_errors=True)
    for home in ("/nonexistent", "", "/", "relative"):
        process = bench.start(
            "run",
            str(bench.recipe(2)),
            "--overwrite",
            command=account,
            HOME=home,
            SLM_PLUGIN_CACHE="",
            XDG_CACHE_HOME="",
        )
        code, said = ended(process, row, f"HOME={home!r}")
        row.tried += 1
        row.worked += code == 0
        if code:
            row.wrong.append(f"HOME={home!r}: exit {code}: {said[-300:]}")
        shutil.rmtree(bench.output, ignore_errors=True)
    yield row


def hostile(bench: Bench) -> Iterator[Row]:
    """Modules in the working directory that have the names of what child processes import."""
    row = Row("modules of the working directory")
    work = bench.folder / "work"
    work.mkdir(exist_ok=True)
    names = ("json", "torch", "numpy", "transformers", "slm_plugin", "sitecustomize", "logging")
    for name in names:
        (work / f"{name}.py").write_text(f"open({str(bench.folder / 'RAN')!r}, 'a').write('x')\n")
    code, said = ended(bench.start("run", str(bench.recipe(2)), "--overwrite"), row, "hostile")
    row.tried, row.worked = len(names), len(names) if code == 0 else 0
    if code:
        row.wrong.append(f"exit {code}: {said[-300:]}")
    row.ran = int((bench.folder / "RAN").exists())
    for name in names:
        (work / f"{name}.py").unlink()
    yield row


def fuzzed(bench: Bench) -> Iterator[Row]:
    """Mutated recipes, model configs, plans, journals and cached cells (``tests/fuzz``)."""
    command = [sys.executable, "-m", "tests.fuzz", "--count", str(40 * bench.count)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        cells = [cell.strip().replace(",", "") for cell in line.strip("|").split("|")]
        if len(cells) == 5 and cells[1].isdigit():
            row = Row(f"mutated {cells[0]}", *map(int, cells[1:]))
            row.wrong += [done.stdout] if row.internal else []
            yield row


KINDS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    "outputs": outputs,
    "places": places,
    "hostile": hostile,
    "races": races,
    "kills": kills,
    "signals": signals,
    "full_disk": full_disk,
    "no_home": no_home,
    "fuzzed": fuzzed,
}


def main() -> None:
    """Run the kinds that are asked for and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--count", type=int, default=50, help="of each random trouble")
    parser.add_argument("--real", action="store_true", help="the default model, not a tiny one")
    arguments = parser.parse_args()
    failed = False
    print("| kind | tried | refused | worked | internal errors | files lost | code run |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        bench = _bench(Path(folder).resolve(), arguments)
        for name in arguments.only:
            for row in KINDS[name](bench):
                counts = (row.tried, row.refused, row.worked, row.internal, row.lost, row.ran)
                print(f"| {row.kind} | {' | '.join(map(str, counts))} |", flush=True)
                for line in row.wrong:
                    print(f"  {line}", file=sys.stderr, flush=True)
                failed |= bool(row.wrong or row.internal or row.lost or row.ran)
    raise SystemExit(int(failed))


def _bench(folder: Path, arguments: argparse.Namespace) -> Bench:
    if arguments.real:
        calibration = "{{source: builtin, samples: 8, length: 64, seed: {seed}}}"
        return Bench(folder, "smollm2-135m", arguments.count, calibration)
    from tests.tiny import make_checkpoint

    os.environ["SLM_PLUGIN_CACHE"] = str(folder / "cache")
    make_checkpoint(folder / "model", num_hidden_layers=6)
    words = random.Random(0)
    text = "\n\n".join(
        " ".join(f"w{words.randrange(3, 128)}" for _ in range(60)) for _ in range(40)
    )
    (folder / "text.txt").write_text(text)
    calibration = f"{{{{source: {folder / 'text.txt'}, samples: 8, length: 24, seed: {{seed}}}}}}"
    return Bench(folder, str(folder / "model"), arguments.count, calibration)


if __name__ == "__main__":
    main()
