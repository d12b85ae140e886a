"""What a command is to leave behind, for the line that says what is there when it was stopped."""

from __future__ import annotations

import os
from pathlib import Path

from slm_plugin.control_characters import visible

_Identity = tuple[int, frozenset[tuple[str, int]]] | None
_awaited: list[tuple[Path, _Identity]] = []


def await_folder(folder: Path) -> None:
    """Note the folder that the command will write, and what is there now."""
    _awaited[:] = [(folder.absolute(), _identity(folder))]


def await_nothing() -> None:
    """A command begins; what it prints is all that it gives unless it names a folder."""
    _awaited.clear()


def has_folder() -> bool:
    """Whether the command's result lies in a folder, and what it prints is a summary."""
    return bool(_awaited)


def interrupted_line() -> str:
    """What is true of a command that was stopped: its folder appears whole or not at all."""
    for folder, before in _awaited:
        if _identity(folder) not in (None, before):
            return f"interrupted; {visible(folder)} was written before and is complete"
    return "interrupted; nothing was written"


def _identity(folder: Path) -> _Identity:
    """What tells a folder from the one that takes its place; None where there is none."""
    try:
        with os.scandir(folder) as entries:
            held = frozenset((entry.name, entry.inode()) for entry in entries)
        return folder.stat().st_ino, held
    except (OSError, ValueError):
        return None
