"""Scratch folders with an owner record, so that a later run can clean up after a kill."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from slm_plugin.errors import OutputError, WriteError
from slm_plugin.outputs.owner import RECORD, read_record, surely_dead, this_process

# In the system's folder for temporary files, where no output has given us a name.
TEMPORARY = ".slm-plugin-"


@dataclass(frozen=True, slots=True)
class Work:
    """A scratch folder: its owner's record, what is being written, and what that replaces."""

    path: Path

    @property
    def result(self) -> Path:
        """The new result, which is renamed to its destination."""
        return self.path / "result"

    @property
    def replaced(self) -> Path:
        """The former result during the replacement."""
        return self.path / "replaced"

    @property
    def replacing(self) -> Path:
        """Where the entries of a folder go that cannot be renamed, until all of them are there."""
        return self.path / "replacing"

    @property
    def holds_former(self) -> bool:
        """Whether a former result lies here: then only its successor's being there deletes it."""
        return os.path.lexists(self.replaced) or os.path.lexists(self.replacing)

    def remove(self) -> None:
        """Delete it; what cannot be deleted is left to the next start."""
        # First out of the way of `put_back`: half of a former result is none.
        with suppress(OSError):
            self.replaced.rename(self.path / "rest")
        shutil.rmtree(self.path, ignore_errors=True)


def prefix(name: str) -> str:
    """How the names of all scratch folders of an output begin."""
    return f".{name}.partial-"


def make_work(parent: Path, start: str, folder: str, mode: int = 0o777) -> Work:
    """Make a scratch folder.

    Args:
        parent: Where.
        start: How its name begins.
        folder: Name of what will be in it, for its record.
        mode: Permissions, of which the umask takes its share.

    Raises:
        OSError: It cannot be made.
    """
    work = Work(parent / f"{start}{secrets.token_hex(4)}")
    work.path.mkdir(mode=mode)
    try:
        text = json.dumps(this_process(folder))
        (work.path / RECORD).write_text(text, encoding="utf-8")
        work.result.mkdir(mode=mode)
    except BaseException:
        work.remove()
        raise
    return work


def works(parent: Path, start: str, folder: str) -> Iterator[Work]:
    """Scratch folders that this user's processes made for a folder; nobody else's."""
    try:
        found = [name for name in names(parent) if name.startswith(start)]
    except OSError:
        return
    for name in found:
        path = parent / name
        try:
            status = path.lstat()
        except OSError:
            continue
        mine = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
        if stat.S_ISDIR(status.st_mode) and mine and read_record(path / RECORD, folder):
            yield Work(path)


def dead(work: Work, *, locked: bool = False) -> bool:
    """Whether the process that made it has surely ended."""
    record = read_record(work.path / RECORD)
    return record is not None and surely_dead(record, locked=locked)


def names(folder: Path) -> list[str]:
    """Names of everything in a folder, sorted.

    Raises:
        OSError: It cannot be looked into.
    """
    return sorted(path.name for path in folder.iterdir())


def share(folder: Path) -> None:
    """Give everything in a new folder the permissions that the umask gave the folder.

    Some libraries write weights as private as temporary files, which a result is not.
    """
    mode = stat.S_IMODE(folder.stat().st_mode) & 0o777
    for path in folder.rglob("*"):
        found = path.lstat().st_mode
        wanted = mode if stat.S_ISDIR(found) else (mode & 0o666) | (found & mode & 0o111)
        if not stat.S_ISLNK(found) and stat.S_IMODE(found) & 0o777 != wanted:
            with suppress(OSError):
                path.chmod(stat.S_IMODE(found) & ~0o777 | wanted)


def remove(path: Path) -> None:
    """Delete a file, a link or a folder, as far as it can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def sweep_temporary() -> None:
    """Delete what killed processes of this user left in the folder for temporary files."""
    with suppress(OSError):
        _sweep(Path(tempfile.gettempdir()), TEMPORARY, "")


def _sweep(parent: Path, start: str, folder: str) -> None:
    for work in works(parent, start, folder):
        if dead(work) and not work.holds_former:
            work.remove()


@contextmanager
def temporary_folder(parent: Path | None = None) -> Iterator[Path]:
    """Give a folder that is deleted behind the block, after a kill by the next start.

    Args:
        parent: Where; by default where the system has its temporary files.

    Raises:
        OutputError: It cannot be made.
    """
    try:
        where = parent or Path(tempfile.gettempdir())
        _sweep(where, TEMPORARY, "")
        work = make_work(where, TEMPORARY, "", 0o700)
    except OSError as error:
        raise OutputError(
            f"cannot write temporary files: {error.strerror or error}",
            hint="set TMPDIR to a folder that can be written",
        ) from error
    try:
        yield work.result
    finally:
        work.remove()


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give a scratch folder beside ``folder`` that takes its place when the block succeeds.

    For a part of an output, or of the cache: `claim` is for the output as a whole. A killed process
    leaves at most a hidden ``.name.partial-*`` folder, which the next one removes.

    Raises:
        OutputError: The folder exists or cannot be written.
    """
    if folder.is_dir() and any(folder.iterdir()):
        raise OutputError(f"the folder {folder} exists", hint="choose another")
    start = prefix(folder.name)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent, start, folder.name)
        work = make_work(folder.parent, start, folder.name)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror or error}") from error
    try:
        yield work.result
        share(work.result)
        work.result.rename(folder)
    except OSError as error:
        if error.errno is None:
            raise
        raise write_error(folder, error) from error
    finally:
        work.remove()


def write_error(folder: Path, error: OSError) -> WriteError:
    """What an error of the system means for the one who waits for an output."""
    return WriteError(
        f"writing {folder} failed: {error.strerror or error}",
        hint="check the free disk space and the permissions",
    )
