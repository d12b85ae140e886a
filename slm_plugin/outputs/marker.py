"""Marker files: which folders this tool wrote, and which files in them it did not write."""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import slm_plugin
from slm_plugin.files import write_text
from slm_plugin.outputs.owner import TOOL, read_record
from slm_plugin.outputs.scratch import names, prefix, works

Kind = Literal["run", "plan", "apply", "analyze", "compare", "save"]
MARKER = ".slm-plugin.json"
# The identity of a file for which none was recorded.
ANY = "any"
# Beside a folder that is filled in place stand its lock and its scratch folder inside.
LOCK = ".slm-plugin.lock"
INSIDE = "slm-plugin"
# Files that systems and file managers put into folders by themselves, and the folder that a file
# system has at its root.
LITTER = (".DS_Store", "Thumbs.db", "desktop.ini")
LOST = "lost+found"
# Largest marker or report in bytes; a larger file is foreign.
LARGEST = 1 << 28
_PLAN = re.compile(r"plan-[0-9]+-(.+)\.json")
# All that a checkpoint of before the marker can hold.
_CHECKPOINT = re.compile(
    r"(model(-[0-9]+-of-[0-9]+)?\.safetensors|model\.safetensors\.index\.json|config\.json"
    r"|generation_config\.json|tokenizer(_config)?\.json|special_tokens_map\.json"
    r"|added_tokens\.json|vocab\.json|merges\.txt|tokenizer\.model|chat_template\.jinja)"
)
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
    """The contents of a folder.

    Attributes:
        empty: It has no relevant files.
        known: This tool wrote it, according to its marker or its report.
        strangers: Files that this tool did not write, as paths inside the folder.
    """

    empty: bool
    known: bool
    strangers: tuple[str, ...]


# Size and time of the last change; None for what is no file.
Identity = tuple[int, int] | None


def mark(folder: Path, kind: Kind, *, incomplete: bool = False) -> None:
    """Write the marker: who wrote the folder, and all files in it with size and time of change.

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
        "contents": {name: _identity(folder / name) for name in sorted(_files(folder))},
    }
    write_text(folder / MARKER, json.dumps(marker, indent=2) + "\n")


def contents(folder: Path, *, inside: bool = False) -> Contents:
    """Examine a folder; only a known one is walked.

    Args:
        folder: The folder.
        inside: It is filled in place, so that a lock and scratch folders of ours may lie in it.

    Raises:
        OSError: It cannot be looked into.
    """
    top = entries(folder, inside=inside)
    if not top:
        return Contents(empty=True, known=False, strangers=())
    written = _written(folder, top)
    if written is None:
        return Contents(empty=False, known=False, strangers=tuple(sorted(top)))
    strangers = []
    for name in _files(folder, inside=inside):
        if name != MARKER and name not in written:
            strangers.append(name)
        elif name != MARKER and written[name] not in (ANY, _identity(folder / name)):
            strangers.append(f"{name} (changed since)")
    return Contents(empty=False, known=True, strangers=tuple(sorted(strangers)))


def entries(folder: Path, *, inside: bool = False) -> list[str]:
    """Names in a folder without litter.

    Args:
        folder: The folder.
        inside: Leave out our lock and scratch folders, too, which stand in a folder that is filled
            in place.
    """
    ours = set()
    if inside:
        ours = {work.path.name for work in works(folder, prefix(INSIDE), INSIDE)}
        if _is_lock(folder / LOCK):
            ours.add(LOCK)
    return [n for n in names(folder) if n not in ours and not _is_litter(folder / n)]


def _is_litter(path: Path) -> bool:
    """Whether an entry is litter of the system by kind, not only by name."""
    if path.name in LITTER:
        return stat.S_ISREG(path.lstat().st_mode)
    if path.name != LOST or path.is_symlink() or not path.is_dir() or mounted(path):
        return False
    try:
        return not names(path)
    except PermissionError:
        # At the root of a file system it is the administrator's.
        return os.path.ismount(path.parent)


def _is_lock(path: Path) -> bool:
    try:
        found = path.lstat()
    except OSError:
        return False
    return stat.S_ISREG(found.st_mode) and (not found.st_size or read_record(path) is not None)


def _identity(path: Path) -> Identity:
    found = path.lstat()
    return (found.st_size, found.st_mtime_ns) if stat.S_ISREG(found.st_mode) else None


def _files(folder: Path, *, inside: bool = False) -> Iterator[str]:
    """Everything that is no folder, and folders that are empty or mounted, by its path inside."""

    def fail(error: OSError) -> None:
        raise error

    points = _mount_points()
    for at, folders, files in os.walk(folder, onerror=fail):
        here = Path(at)
        counted = set(entries(here, inside=inside and here == folder))
        if not counted and here != folder:
            yield here.relative_to(folder).as_posix()
        folders[:] = [name for name in folders if name in counted]
        apart = [f for f in folders if (here / f).is_symlink() or str(here / f) in points]
        folders[:] = [name for name in folders if name not in apart]
        for name in (*(file for file in files if file in counted), *apart):
            yield (here / name).relative_to(folder).as_posix()


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


def _written(folder: Path, top: list[str]) -> dict[str, object] | None:
    """What this tool wrote into a folder, by path; None where it is none of its folders.

    What was written before there was a marker has no identity that could be compared.
    """
    marker = _json(folder / MARKER)
    if marker is not None and marker.get("tool") == TOOL:
        listed = marker.get("contents")
        if isinstance(listed, dict):
            return {n: tuple(one) if isinstance(one, list) else one for n, one in listed.items()}
    for report, keys in _REPORTS.items():
        data = _json(folder / report) if report in top else None
        if data is not None and all(key in data for key in keys):
            return dict.fromkeys([report, *_BESIDE[report], *_of_run(folder, data)], ANY)
    named = [_PLAN.fullmatch(name) for name in top]
    if all(match and _is_plan(folder / match[0], match) for match in named):
        return dict.fromkeys(top, ANY)
    if set(top) == {"checkpoint", "plan.json"} and _is_plan(folder / "plan.json"):
        listed = [name for name in names(folder / "checkpoint") if _CHECKPOINT.fullmatch(name)]
        return dict.fromkeys(["plan.json", *(f"checkpoint/{name}" for name in listed)], ANY)
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


def _is_plan(file: Path, name: re.Match[str] | None = None) -> bool:
    """Whether a file holds a plan, and has the name that its strategy gives it."""
    data = _json(file)
    if data is None or not {"operations", "fingerprint", "pruner"} <= set(data):
        return False
    return name is None or name[1] == data["pruner"]


def _json(file: Path) -> dict[str, Any] | None:
    try:
        if file.is_symlink() or not file.is_file() or file.stat().st_size > LARGEST:
            return None
        data = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return data if isinstance(data, dict) else None


def _dicts(value: object) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []
