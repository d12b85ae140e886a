"""The owner process of a scratch folder, and whether it has certainly ended."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TOOL = "slm-plugin"
RECORD = "owner.json"
# Bytes of a record; a larger file is not ours.
_LARGEST = 1 << 16


def this_process(folder: str) -> dict[str, Any]:
    """The record of this process as the owner of what becomes ``folder``.

    A process id alone is ambiguous: ids are reused, containers have their own, and machines share
    disks. The record therefore includes machine, boot, id namespace and start time.
    """
    return {
        "tool": TOOL,
        "folder": folder,
        "host": platform.node(),
        "machine": _read("/etc/machine-id"),
        "boot": _read("/proc/sys/kernel/random/boot_id"),
        "ids": _id_space(),
        "pid": os.getpid(),
        "started": _status(os.getpid())[1],
    }


def read_record(file: Path, folder: str | None = None) -> dict[str, Any] | None:
    """The record in a file; None where this tool did not write one (for that folder)."""
    try:
        if file.is_symlink() or not file.is_file() or file.stat().st_size > _LARGEST:
            return None
        record = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(record, dict) or record.get("tool") != TOOL:
        return None
    other = folder is not None and record.get("folder") != folder
    return None if other or type(record.get("pid")) is not int else record


def surely_dead(record: Mapping[str, Any], *, locked: bool = False) -> bool:
    """Whether the process of a record has ended; False where this is unknown.

    Args:
        record: As `this_process` makes it.
        locked: This process holds the lock that the owner held while it ran.
    """
    here = this_process("")
    if record.get("boot") != here["boot"]:
        # Another boot of this very machine: nothing has lived through it.
        return bool(
            here["machine"]
            and here["boot"]
            and record.get("boot")
            and all(record.get(key) == here[key] for key in ("machine", "host"))
        )
    if not here["boot"] and record.get("host") != here["host"]:
        return False
    if locked and here["boot"]:
        # One kernel, so its locks can be relied on.
        return True
    if record.get("ids") != here["ids"]:
        return False
    return _ended(int(record["pid"]), record.get("started"))


def _ended(pid: int, started: object) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except OSError:
        return False
    state, now = _status(pid)
    # Z and X hold nothing any more; their parent has not asked for their exit code yet.
    return state in ("Z", "X") or (now is not None and started is not None and now != started)


def _status(pid: int) -> tuple[str, int | None]:
    """State and start time of a process, where the system tells."""
    # The command's name is in parentheses and may hold spaces and parentheses itself.
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    return (fields[0], int(fields[19])) if len(fields) > 19 else ("", None)


def _id_space() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
