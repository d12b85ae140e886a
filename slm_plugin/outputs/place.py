"""Check the location of an output before any computation."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from unicodedata import category

import slm_plugin
from slm_plugin.errors import OutputError
from slm_plugin.outputs.marker import INSIDE, contents, mounted
from slm_plugin.outputs.scratch import prefix, works

ELSEWHERE = "choose another output folder"
# Bytes that our own names take around that of an output: ".", ".partial-" and eight digits, or
# ".slm-plugin.lock"; and what the paths of its files take below it.
_AROUND = 24
_BELOW = 512


@dataclass(frozen=True, slots=True)
class Input:
    """A file or folder that an output must not overwrite.

    Attributes:
        what: Its name in messages.
        path: Its path.
        roomy: Outputs may be inside it, because it has more than the input.
    """

    what: str
    path: Path
    roomy: bool = False


@dataclass(frozen=True, slots=True)
class Place:
    """A folder that may become an output.

    Attributes:
        named: The path as the user wrote it.
        target: The path with links resolved.
        inside: It is filled in place, because it is a mount point or its parent is not writable.
        found: Identity of the existing target; None where there was none.
    """

    named: Path
    target: Path
    inside: bool
    found: tuple[int, int] | None


def identity(path: Path) -> tuple[int, int] | None:
    """The present identity of a path, device and inode; None where it does not exist."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


def located(text: str) -> Path:
    """The folder that a text names, ``~`` replaced.

    Raises:
        OutputError: The text cannot name a folder.
    """
    if not text.strip():
        raise OutputError("the output folder has no name", hint="name a folder")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise OutputError(
            f"the output folder {text!a} is no Unicode text", hint=ELSEWHERE
        ) from None
    if any(category(character) == "Cc" for character in text):
        raise OutputError(
            f"the output folder {text!a} has a control character in its name", hint=ELSEWHERE
        )
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise OutputError(
            f"the output folder {text}: there is no home folder {text.split('/')[0]}",
            hint="write the path in full",
        ) from None


def local(what: str, name: str, *, roomy: bool = False) -> tuple[Input, ...]:
    """The existing file or folder of a name, as an input that an output must not overwrite.

    Args:
        what: Its name in messages.
        name: A path, or something else.
        roomy: Outputs may be inside it if it contains the working directory.
    """
    found = []
    with suppress(OSError, ValueError, RuntimeError):
        for path in dict.fromkeys((Path(name), Path(name).expanduser())):
            if path.exists():
                here = roomy and _holds(_real(path), _real(Path.cwd()))
                found.append(Input(what, path, here))
    return tuple(found)


def resolve_output(folder: Path, inputs: Iterable[Input] = ()) -> Place:
    """Resolve and check an output folder; writes nothing.

    A symbolic link to a folder is followed: its target is written, and the link remains.

    Args:
        folder: The path as the user named it.
        inputs: Files and folders that it must not overlap.

    Raises:
        OutputError: It cannot be written, or is not one to replace.
    """
    located(str(folder))
    try:
        _refuse_lengths(folder)
        _refuse_links(folder)
        target = Path(os.path.realpath(folder))
        _refuse_lengths(target)
        _refuse_protected(folder, target, inputs)
        if target.exists() and not target.is_dir():
            raise OutputError(f"{folder} is a file", hint="name a folder that does not exist yet")
        inside = target.is_dir() and not _can_rename(target)
        _refuse_unwritable(target, inside)
        if target.is_dir() and not (inside and _half_replaced(target)):
            _refuse_strangers(folder, target, inside)
    except OSError as error:
        raise _unreadable(folder, error) from error
    return Place(folder, target, inside, identity(target))


def _unreadable(folder: Path, error: OSError) -> OutputError:
    return OutputError(
        f"cannot look into the output folder {folder}: {error.strerror or error}", hint=ELSEWHERE
    )


def refuse_existing(place: Place, *, overwrite: bool) -> None:
    """Check that a folder is empty, or a former result that may be replaced.

    Raises:
        OutputError: It is neither.
    """
    try:
        if identity(place.target) != place.found:
            raise OutputError(
                f"the output folder {place.named} is not what it was when the command began",
                hint="somebody else wrote there meanwhile; choose another folder",
            )
        if place.found is None:
            return
        _refuse_strangers(place.named, place.target, place.inside)
        empty = contents(place.target, inside=place.inside).empty
    except OSError as error:
        raise _unreadable(place.named, error) from error
    if not overwrite and not empty:
        raise OutputError(
            f"the output folder {place.named} exists", hint="choose another or pass --overwrite"
        )


def refuse_same(folder: Path, other: Path, what: str) -> None:
    """Check that two outputs do not overlap.

    Raises:
        OutputError: They do.
    """
    first, second = Path(os.path.realpath(folder)), Path(os.path.realpath(other))
    if _holds(first, second) or _holds(second, first):
        raise OutputError(
            f"the folder {folder} is, holds or lies inside {what} {other}", hint="choose another"
        )


def _refuse_lengths(path: Path) -> None:
    above = next((p for p in path.absolute().parents if _exists(p)), Path("/"))
    longest, whole = _limit(above, "PC_NAME_MAX", 255), _limit(above, "PC_PATH_MAX", 4096)
    parts = [len(os.fsencode(part)) for part in path.parts]
    if parts and (max(parts) > longest or parts[-1] > longest - _AROUND):
        raise OutputError(
            f"the name of the output folder {_short(path)} is too long: {max(parts)} bytes",
            hint=f"take at most {longest - _AROUND}",
        )
    if len(os.fsencode(path.absolute())) > whole - _BELOW:
        raise OutputError(
            f"the path of the output folder {_short(path)} is too long: "
            f"{len(os.fsencode(path.absolute()))} bytes",
            hint=f"take at most {whole - _BELOW}",
        )


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:
        return False


def _limit(path: Path, name: str, usual: int) -> int:
    try:
        found = os.pathconf(path, name)
    except (AttributeError, OSError, ValueError):
        return usual
    return found if found > 0 else usual


def _short(path: Path) -> str:
    text = str(path)
    return text if len(text) <= 80 else f"{text[:60]}…"


def _refuse_links(folder: Path) -> None:
    for path in (folder, *folder.parents):
        if path.is_symlink() and not path.exists():
            raise OutputError(
                f"the link {path} leads nowhere, so {folder} cannot be written",
                hint=f"delete the link, or {ELSEWHERE}",
            )
        if path.name == ".." and not path.parent.exists():
            raise OutputError(f"there is no folder {path.parent}", hint=ELSEWHERE)


def _refuse_protected(folder: Path, target: Path, inputs: Iterable[Input]) -> None:
    if target == Path(target.anchor):
        raise OutputError(f"the output folder {folder} is the root of the disk", hint=ELSEWHERE)
    for one in _places_of_the_user():
        if _holds(target, _real(one.path)):
            is_it = "is" if _same(target, _real(one.path)) else "holds"
            raise OutputError(
                f"the output folder {folder} {is_it} {one.what}, which is never replaced",
                hint="name a folder in it",
            )
    package = Input("the installed package", Path(slm_plugin.__file__).parent)
    for one in (*inputs, package):
        at = _real(one.path)
        if not _exists(at):
            continue
        if _same(target, at):
            relation = "is"
        elif _holds(target, at):
            relation = "holds"
        elif at.is_dir() and _holds(at, target) and not one.roomy:
            relation = "lies inside"
        else:
            continue
        raise OutputError(f"the output folder {folder} {relation} {one.what}", hint=ELSEWHERE)


def _places_of_the_user() -> Iterator[Input]:
    with suppress(OSError):
        yield Input("the working directory", Path.cwd())
    homes = [os.environ.get("HOME", "")]
    try:
        import pwd

        homes.append(pwd.getpwuid(os.getuid()).pw_dir)
    except (ImportError, KeyError):
        # Windows, or a user without an entry.
        pass
    for home in homes:
        if Path(home).is_absolute():
            yield Input("the home folder", Path(home))


def _real(path: Path) -> Path:
    return Path(os.path.realpath(path))


def _holds(outer: Path, inner: Path) -> bool:
    return any(_same(outer, path) for path in (inner, *inner.parents))


def _same(one: Path, other: Path) -> bool:
    """Whether two paths are the same, by name or by identity, as a folder may have two names."""
    if one == other:
        return True
    try:
        return one.samefile(other)
    except OSError:
        return False


def _can_rename(target: Path) -> bool:
    above = target.parent
    if mounted(target) or not _writable(above):
        return False
    status = above.stat()
    if not status.st_mode & stat.S_ISVTX or not hasattr(os, "geteuid"):
        return True
    # In a folder such as /tmp only the owner may rename.
    return os.geteuid() in (0, status.st_uid, target.stat().st_uid)


def _refuse_unwritable(target: Path, inside: bool) -> None:
    where = target if inside else next(p for p in target.parents if os.path.lexists(p))
    if not where.is_dir() or not _writable(where):
        raise OutputError(f"cannot write into {where}", hint=ELSEWHERE)


def _writable(folder: Path) -> bool:
    return os.access(folder, os.W_OK | os.X_OK)


def _half_replaced(target: Path) -> bool:
    """Whether a process ended while it filled a folder in place, which `claim` cleans up."""
    left = list(works(target, prefix(INSIDE), INSIDE))
    return any(work.replacing.exists() or work.replaced.exists() for work in left)


def _refuse_strangers(folder: Path, target: Path, inside: bool) -> None:
    found = contents(target, inside=inside)
    if found.strangers:
        first = os.fsencode(found.strangers[0]).decode("utf-8", "backslashreplace")
        more = f" and {len(found.strangers) - 1} more" if len(found.strangers) > 1 else ""
        raise OutputError(
            f"the output folder {folder} holds what is no part of a former result: {first}{more}",
            hint="that is never replaced; move it away or choose another folder",
        )
    if found.known:
        for at, _, _ in os.walk(target):
            if not _writable(Path(at)):
                raise OutputError(f"cannot replace {folder}: {at} is not writable", hint=ELSEWHERE)


def scratch_names(place: Place) -> tuple[Path, str, str]:
    """Folder, beginning of the name, and recorded name of an output's scratch folders."""
    if place.inside:
        return place.target, prefix(INSIDE), INSIDE
    return place.target.parent, prefix(place.target.name), place.target.name
