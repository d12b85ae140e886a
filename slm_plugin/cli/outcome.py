"""The output folder of the running command, for the message after an interruption."""

from __future__ import annotations

import os
from pathlib import Path

from slm_plugin.control_characters import visible

_Identity = tuple[int, frozenset[tuple[str, int]]] | None
_awaited: list[tuple[Path, _Identity]] = []


def await_folder(folder: Path) -> None:
    """Record the folder that the command will write, and its present identity."""
    _awaited[:] = [(folder.absolute(), _identity(folder))]


def await_nothing() -> None:
    """Start a command; without a folder its output is what it prints."""
    _awaited.clear()


def has_folder() -> bool:
    """Whether the command's result is in a folder, and what it prints is a summary."""
    return bool(_awaited)


def interrupted_line() -> str:
    """The message after an interruption: the folder is complete or was not written."""
    for folder, before in _awaited:
        if _identity(folder) not in (None, before):
            return f"interrupted; {visible(folder)} was written before and is complete"
    return "interrupted; nothing was written"


def _identity(folder: Path) -> _Identity:
    """The identity of a folder; None where there is none."""
    try:
        with os.scandir(folder) as entries:
            held = frozenset((entry.name, entry.inode()) for entry in entries)
        return folder.stat().st_ino, held
    except (OSError, ValueError):
        return None
