"""Replace a former result, and restore it if anything fails.

A folder is replaced by two renames: the former result into the scratch folder, the new one out of
it. A folder that cannot be renamed is filled in place, entry by entry, the marker last. In both
cases the scratch folder shows how far the replacement got, so that `undo` works in the next process
after a kill.
"""

from __future__ import annotations

import errno
import json
import os
import stat
from contextlib import suppress
from pathlib import Path

from slm_plugin.errors import OutputError
from slm_plugin.outputs.marker import MARKER, contents, entries
from slm_plugin.outputs.place import Place, identity
from slm_plugin.outputs.scratch import Work, names


def take_place(work: Work, place: Place) -> None:
    """Make the marked result the output.

    Raises:
        OSError: It cannot be replaced; the former result is unchanged.
    """
    _to_disk(work.result)
    try:
        if place.inside:
            _fill(work, place.target)
        else:
            if place.found is not None:
                _keep_mode(work.result, place.target)
                place.target.rename(work.replaced)
                _refuse_newcomers(work, place)
            work.result.rename(place.target)
        _sync(place.target if place.inside else place.target.parent)
    except BaseException:
        undo(work, place)
        raise


def _keep_mode(result: Path, former: Path) -> None:
    """Keep the mode and the group of the former folder."""
    status = former.stat()
    # Whoever moves a folder has to be able to write into it.
    result.chmod(stat.S_IMODE(status.st_mode) | stat.S_IRWXU)
    if hasattr(os, "chown"):
        with suppress(OSError):
            os.chown(result, status.st_uid, status.st_gid)


def _refuse_newcomers(work: Work, place: Place) -> None:
    """Check that the moved folder is the one that was examined, because it will be deleted."""
    if identity(work.replaced) != place.found or contents(work.replaced).strangers:
        raise OutputError(
            f"the output folder {place.named} was changed in the moment of replacing it",
            hint="start again",
        )


def undo(work: Work, place: Place) -> None:
    """Restore the state before `take_place`.

    Raises:
        OSError: Something cannot be moved back; it stays in the scratch folder.
    """
    if place.inside:
        _unfill(work, place.target)
        return
    if not os.path.lexists(work.result):
        place.target.rename(work.result)
    if os.path.lexists(work.replaced):
        work.replaced.rename(place.target)


def put_back(work: Work, place: Place) -> Path | None:
    """Restore the former result that a killed process had moved; returns its path.

    Raises:
        OSError: It cannot be moved; it stays in the scratch folder.
    """
    if not work.holds_former or finished(work, place):
        return None
    if place.inside:
        return place.target if _unfill(work, place.target) else None
    # Someone may have made another folder of that name since.
    taken = os.path.lexists(place.target) and not (
        place.target.is_dir() and not place.target.is_symlink() and not names(place.target)
    )
    back = free_name(place.target, "replaced") if taken else place.target
    work.replaced.rename(back)
    return back


def free_name(path: Path, word: str) -> Path:
    """A free name beside a folder, with a suffix."""
    found, number = path.with_name(f"{path.name}.{word}"), 1
    while os.path.lexists(found):
        number += 1
        found = path.with_name(f"{path.name}.{word}-{number}")
    return found


def finished(work: Work, place: Place) -> bool:
    """Whether the result is in its place."""
    if place.inside:
        return os.path.lexists(work.replaced) and not os.path.lexists(work.result / MARKER)
    return not os.path.lexists(work.result) and os.path.lexists(place.target)


def _fill(work: Work, target: Path) -> None:
    work.replacing.mkdir()
    for name in entries(target, inside=True):
        (target / name).rename(work.replacing / name)
    # Behind this step all former entries are away, before it no new one is there.
    work.replacing.rename(work.replaced)
    for name in sorted(names(work.result), key=MARKER.__eq__):
        (work.result / name).rename(target / name)


def _unfill(work: Work, target: Path) -> bool:
    """Undo `_fill` from wherever it stopped; whether there was a former entry."""
    if os.path.lexists(work.replaced):
        at = work.result if os.path.lexists(work.result / MARKER) else target
        listed = json.loads((at / MARKER).read_text(encoding="utf-8"))["contents"]
        for name in dict.fromkeys([*(path.split("/")[0] for path in listed), MARKER]):
            if not os.path.lexists(work.result / name) and os.path.lexists(target / name):
                (target / name).rename(work.result / name)
        work.replaced.rename(work.replacing)
    if not os.path.lexists(work.replacing):
        return False
    former = names(work.replacing)
    for name in former:
        back = target / name
        if os.path.lexists(back):
            back = free_name(back, "replaced")
        (work.replacing / name).rename(back)
    work.replacing.rmdir()
    return bool(former)


def _to_disk(folder: Path) -> None:
    """Flush everything to disk before a rename, so that a power cut loses no content."""
    for at, _, files in os.walk(folder):
        for name in files:
            path = Path(at) / name
            if path.is_file() and not path.is_symlink():
                _sync(path)
        _sync(Path(at))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        with suppress(OSError):
            os.close(descriptor)
