"""Which folders this tool wrote, and what in them it did not write."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import slm_plugin
from slm_plugin.files import write_text
from slm_plugin.outputs.owner import TOOL
from slm_plugin.outputs.scratch import names, prefix, works

Kind = Literal["run", "plan", "apply", "analyze", "compare"]
MARKER = ".slm-plugin.json"
# Beside a folder that is filled in place stand its lock and its scratch folder inside.
LOCK = ".slm-plugin.lock"
INSIDE = "slm-plugin"
# What systems and file managers put into folders by themselves.
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini", "lost+found")
_PLAN = re.compile(r"plan-\d+-.+\.json")
_CHECKPOINT = (".safetensors", ".json", ".txt", ".jinja", ".model")
# Reports of before the marker, and what lay beside them.
_REPORTS = {
    "report.json": ("recipe", "stages", "exports", "versions"),
    "analysis.json": ("calibration", "figures", "fingerprint"),
    "comparison.json": ("comparison", "cells", "fingerprint"),
}
_BESIDE = {
    "report.json": ("report.html", "README.md"),
    "analysis.json": ("analysis.html",),
    "comparison.json": ("comparison.md", "comparison.html"),
}


@dataclass(frozen=True, slots=True)
class Contents:
    """What lies in a folder.

    Attributes:
        empty: Nothing that counts.
        known: This tool wrote the folder, going by its marker or its report.
        strangers: What this tool did not write, as paths inside the folder.
    """

    empty: bool
    known: bool
    strangers: tuple[str, ...]


def mark(folder: Path, kind: Kind, *, incomplete: bool = False) -> None:
    """Write the marker: who wrote the folder, and the paths of all files in it.

    Raises:
        OutputError: It cannot be written.
    """
    (folder / MARKER).unlink(missing_ok=True)
    marker = {
        "tool": TOOL,
        "format": 1,
        "kind": kind,
        "version": slm_plugin.__version__,
        "incomplete": incomplete,
        "contents": sorted(_files(folder)),
    }
    write_text(folder / MARKER, json.dumps(marker, indent=2) + "\n")


def contents(folder: Path) -> Contents:
    """Look into a folder; only a known one is walked through.

    Raises:
        OSError: It cannot be looked into.
    """
    top = entries(folder)
    if not top:
        return Contents(empty=True, known=False, strangers=())
    written = _written(folder, top)
    if written is None:
        return Contents(empty=False, known=False, strangers=tuple(sorted(top)))
    strangers = (name for name in _files(folder) if name not in written and name != MARKER)
    return Contents(empty=False, known=True, strangers=tuple(sorted(strangers)))


def entries(folder: Path) -> list[str]:
    """Names in a folder without litter and without what is there while it is filled in place."""
    ours = {work.path.name for work in works(folder, prefix(INSIDE), INSIDE)}
    passed = {LOCK, *LITTER, *ours}
    return [name for name in names(folder) if name not in passed]


def _files(folder: Path) -> Iterator[str]:
    """Everything that is no folder, and folders that are mounted, by its path inside."""

    def fail(error: OSError) -> None:
        raise error

    top, points = set(entries(folder)), _mount_points()
    for at, folders, files in os.walk(folder, onerror=fail):
        inside = Path(at).relative_to(folder)
        if at == str(folder):
            folders[:], files = [f for f in folders if f in top], [f for f in files if f in top]
        apart = [f for f in folders if (Path(at) / f).is_symlink() or str(Path(at) / f) in points]
        folders[:] = [f for f in folders if f not in apart]
        yield from ((inside / f).as_posix() for f in (*files, *apart) if f not in LITTER)


def mounted(path: Path) -> bool:
    """Whether a file system begins here, a folder that is mounted from the same disk included."""
    return os.path.ismount(path) or str(path) in _mount_points()


def _mount_points() -> frozenset[str]:
    try:
        lines = Path("/proc/self/mountinfo").read_bytes().splitlines()
    except OSError:
        return frozenset()
    # Blanks, tabs, newlines and backslashes are written in octal.
    octal = re.compile(rb"\\([0-7]{3})")
    points = (octal.sub(lambda m: bytes([int(m[1], 8)]), line.split()[4]) for line in lines)
    return frozenset(os.fsdecode(point) for point in points)


def _written(folder: Path, top: list[str]) -> set[str] | None:
    """Paths of what this tool wrote into a folder; None where it is none of its folders."""
    marker = _json(folder / MARKER)
    if marker is not None and marker.get("tool") == TOOL:
        listed = marker.get("contents")
        if isinstance(listed, list) and all(isinstance(name, str) for name in listed):
            return set(listed)
    for report, keys in _REPORTS.items():
        data = _json(folder / report) if report in top else None
        if data is not None and all(key in data for key in keys):
            return {report, *_BESIDE[report], *_of_run(folder, data)}
    if all(_PLAN.fullmatch(name) and _is_plan(folder / name) for name in top):
        return set(top)
    if set(top) == {"checkpoint", "plan.json"} and _is_plan(folder / "plan.json"):
        listed = [f"checkpoint/{name}" for name in names(folder / "checkpoint")]
        return {"plan.json", *(name for name in listed if name.endswith(_CHECKPOINT))}
    return None


def _of_run(folder: Path, report: dict[str, Any]) -> Iterator[str]:
    """Plans and exports of a run without a marker; an export that has grown is not all ours."""
    for stage in _dicts(report.get("stages")):
        yield str(stage.get("plan"))
    for export in _dicts(report.get("exports")):
        place = folder / str(export.get("folder"))
        if place.parent != folder or place.is_symlink() or not place.is_dir():
            continue
        files = [Path(at) / name for at, _, names in os.walk(place) for name in names]
        if sum(file.lstat().st_size for file in files) == export.get("size_bytes"):
            yield from (file.relative_to(folder).as_posix() for file in files)


def _is_plan(file: Path) -> bool:
    data = _json(file)
    return data is not None and {"operations", "fingerprint", "pruner"} <= set(data)


def _json(file: Path) -> dict[str, Any] | None:
    try:
        if file.is_symlink() or not file.is_file():
            return None
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _dicts(value: object) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
