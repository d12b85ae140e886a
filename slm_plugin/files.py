"""Files and folders that appear whole or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slm_plugin.errors import OutputError


def write_text(path: Path, text: str) -> None:
    """Write a text file by rename.

    Raises:
        OutputError: The file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            # mkstemp lets nobody else read, which is not what a result is for.
            Path(name).chmod(0o644)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror or error}") from error


def check_free(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something, before any work is done.

    Raises:
        OutputError: The folder exists and may not be replaced, or a parent is not a folder.
    """
    if folder.exists() and not folder.is_dir():
        raise OutputError(f"{folder} is a file", hint="name a folder that does not exist yet")
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise OutputError(
            f"the output folder {folder} exists", hint="choose another or pass --overwrite"
        )
    parent = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise OutputError(f"cannot write into {parent}", hint="choose another output folder")


@contextmanager
def whole_folder(folder: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Give a scratch folder beside ``folder`` that takes its place when the block succeeds.

    A failed or killed run leaves at most a hidden ``.name.partial-*`` folder, which the next run
    for the same output removes.

    Raises:
        OutputError: The folder exists and may not be replaced, or cannot be written.
    """
    check_free(folder, overwrite=overwrite)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder)
        scratch = Path(
            tempfile.mkdtemp(prefix=f".{folder.name}.partial-{os.getpid()}-", dir=folder.parent)
        )
        scratch.chmod(0o755)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        yield scratch
        _take_place(scratch, folder)
    except OSError as error:
        if error.errno is None:
            raise
        raise OutputError(
            f"writing {folder} failed: {error.strerror or error}",
            hint="check the free disk space and the permissions",
        ) from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _take_place(scratch: Path, folder: Path) -> None:
    if folder.exists():
        old = folder.with_name(f".{folder.name}.replaced-{os.getpid()}")
        folder.rename(old)
        scratch.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    else:
        scratch.rename(folder)


def _remove_stale(folder: Path) -> None:
    """Delete what killed runs left behind; a living process keeps its own."""
    for left in folder.parent.glob(f".{folder.name}.partial-*"):
        pid = left.name.rsplit("partial-", 1)[1].split("-")[0]
        if not pid.isdigit() or not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
