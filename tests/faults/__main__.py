"""``python -m tests.faults``: plant each fault in a copy of the package and see the tests fail."""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.faults import Fault, families, others, pruners

FAULTS = (*pruners.FAULTS, *others.FAULTS, *families.FAULTS)
ROOT = Path(__file__).parents[2]
COPIED = ("slm_plugin", "tests", "benchmarks", "pyproject.toml")
# Exit code of pytest when tests ran and some failed.
FAILED = 1


def main() -> int:
    """Plant the faults that are asked for, print a line for each; 1 when one was not caught."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("words", nargs="*", help="only faults with one of these in file or name")
    parser.add_argument("--no-baseline", action="store_true", help="the tests are known to pass")
    asked = parser.parse_args()
    words: list[str] = asked.words
    chosen = [f for f in FAULTS if not words or any(w in f"{f.file} {f.name}" for w in words)]
    bad = 0
    with tempfile.TemporaryDirectory(prefix="slm-plugin-faults-") as folder:
        copy = Path(folder)
        _copy(copy)
        # A test that fails anyway catches nothing.
        modules = sorted({module for fault in chosen for module in fault.tests.split()})
        code, told = (0, "") if asked.no_baseline else _pytest(copy, modules)
        if code:
            sys.stderr.write(f"{told}\nthe tests fail without any fault\n")
            return 1
        for outcome, fault in _tried(copy, chosen):
            bad += outcome != "caught"
            sys.stdout.write(f"{outcome:12} {fault.file}: {fault.name}\n")
            sys.stdout.flush()
    sys.stdout.write(f"{len(chosen) - bad} of {len(chosen)} faults caught\n")
    return int(bad > 0)


def _copy(folder: Path) -> None:
    ignore = shutil.ignore_patterns("__pycache__")
    for name in COPIED:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=ignore)
        else:
            shutil.copy(ROOT / name, folder / name)


def _tried(folder: Path, faults: list[Fault]) -> Iterator[tuple[str, Fault]]:
    for fault in faults:
        file = folder / "slm_plugin" / fault.file
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        if text.count(fault.original) != 1:
            yield "out of date", fault
            continue
        file.write_text(text.replace(fault.original, fault.faulty), encoding="utf-8")
        code, _ = _pytest(folder, fault.tests.split())
        file.write_text(text, encoding="utf-8")
        yield {FAILED: "caught", 0: "NOT CAUGHT"}.get(code, f"pytest: {code}"), fault


def _pytest(folder: Path, modules: list[str]) -> tuple[int, str]:
    # Without bytecode, which stays in use when a source changes within a second and keeps its size.
    environment = {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-q", "-n", "0", "-p", "no:cacheprovider"]
    paths = [str(folder / "tests" / module) for module in modules]
    ran = subprocess.run([*command, *paths], cwd=folder, env=environment, capture_output=True)
    return ran.returncode, ran.stdout.decode(errors="replace")


if __name__ == "__main__":
    sys.exit(main())
