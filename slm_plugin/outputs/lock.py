"""A lock of the operating system for each output, released when its process ends.

`filelock` is not used: it never deletes lock files, falls back to locks that outlive a killed
process, and its locks are inherited by forked children.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from slm_plugin.errors import OutputError
from slm_plugin.outputs.owner import read_record, this_process
from slm_plugin.progress import say

try:
    import fcntl
except ImportError:  # pragma: no cover - Windows
    fcntl = None  # type: ignore[assignment]

_TAKEN = (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES)
_held: set[int] = set()


def _forget() -> None:
    """Release locks in a forked child, so that they end with the parent."""
    for descriptor in _held:
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def locked(file: Path, target: Path, named: Path) -> Iterator[bool]:
    """Hold the lock of an output; yield whether its file system has locks at all.

    The file is deleted while the lock is held, and a process that opened it meanwhile notices that
    the name is free or another file's. So two processes never hold the lock of one name. An
    existing folder is locked too, because another mount may show it under another parent.

    Args:
        file: The lock's file.
        target: The output folder.
        named: The folder as the user named it.

    Raises:
        OutputError: Another process writes this output.
        OSError: The file cannot be made.
    """
    held = [descriptor for descriptor in (_lock_file(file, named),) if descriptor is not None]
    own = bool(held) and _sign(held[0], file)
    try:
        folder = _lock_folder(target, file, named)
        held += [] if folder is None else [folder]
        if not held:
            say(f"warning: the disk of {named} has no locks; start no second run for this output")
        yield bool(held)
    finally:
        if own:
            with suppress(OSError):
                file.unlink()
        for descriptor in held:
            _held.discard(descriptor)
            with suppress(OSError):
                os.close(descriptor)


def _lock_file(file: Path, named: Path) -> int | None:
    while fcntl is not None:
        descriptor = _open(file)
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise OutputError(
                f"{file} is in the way of the lock of {named}", hint="move it elsewhere"
            )
        if not _lock(descriptor, file, named):
            return None
        with suppress(OSError):
            if os.path.samestat(os.fstat(descriptor), os.lstat(file)):
                return descriptor
        # Its former holder deleted it between our opening and locking it.
        _held.discard(descriptor)
        os.close(descriptor)
    return None


def _lock_folder(target: Path, file: Path, named: Path) -> int | None:
    if fcntl is None:
        return None
    try:
        descriptor = os.open(target, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    return descriptor if _lock(descriptor, file, named) else None


def _lock(descriptor: int, file: Path, named: Path) -> bool:
    """Lock an open file or folder; False (and closed) where its file system knows no locks."""
    _held.add(descriptor)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        _held.discard(descriptor)
        os.close(descriptor)
        if error.errno in _TAKEN:
            raise _taken(file, named) from error
        return False
    return True


def _open(file: Path) -> int:
    flags = os.O_NOFOLLOW | os.O_NONBLOCK
    while True:
        try:
            return os.open(file, os.O_RDWR | flags)
        except FileNotFoundError:
            with suppress(FileExistsError):
                return os.open(file, os.O_RDWR | os.O_CREAT | os.O_EXCL | flags, 0o666)
        except PermissionError:
            # Another user's leftover: read access is enough to lock it.
            return os.open(file, os.O_RDONLY | flags)


def _sign(descriptor: int, file: Path) -> bool:
    """Write the holder into the file; False for a foreign file, which is not changed."""
    if os.fstat(descriptor).st_size and read_record(file) is None:
        return False
    with suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(this_process(file.name)).encode(), 0)
    return True


def _taken(file: Path, named: Path) -> OutputError:
    record = read_record(file)
    who = f" (process {record['pid']} on {record['host']})" if record else ""
    return OutputError(
        f"the output folder {named} is being written by another slm-plugin{who}",
        hint="wait until it ends, or choose another output folder",
    )
