"""Claim an output folder before any computation, and write it atomically."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from slm_plugin.errors import IncompleteError, OutputError, SlmError
from slm_plugin.files import write_text
from slm_plugin.outputs.lock import locked
from slm_plugin.outputs.marker import INSIDE, LOCK, MARKER, Kind, mark
from slm_plugin.outputs.owner import RECORD
from slm_plugin.outputs.place import (
    ELSEWHERE,
    Input,
    Place,
    refuse_existing,
    resolve_output,
    scratch_names,
)
from slm_plugin.outputs.replacing import finished, free_name, put_back, take_place
from slm_plugin.outputs.scratch import (
    Work,
    dead,
    make_work,
    names,
    remove,
    share,
    sweep_temporary,
    works,
    write_error,
)
from slm_plugin.progress import say

INCOMPLETE = "INCOMPLETE.txt"
_TRIES = 20


@dataclass(slots=True)
class Output:
    """An output that is being written.

    Attributes:
        named: The folder as the user named it.
        folder: The scratch folder, which becomes the output at the end.
        failed: Errors in parts of it, by part.
    """

    named: Path
    folder: Path
    failed: dict[str, Exception] = field(default_factory=dict)

    @contextmanager
    def part(self, name: str, *, whole: bool = False) -> Iterator[None]:
        """A part of the output that may fail without stopping the others.

        Args:
            name: Its name in messages.
            whole: Keep the files that it wrote before it failed, because each is complete.
        """
        before = set(names(self.folder))
        try:
            yield
        except Exception as error:
            self.failed[name] = error
            say(f"  {name} failed: {_reason(error)}")
            for left in set() if whole else set(names(self.folder)) - before:
                remove(self.folder / left)


@contextmanager
def claim(
    folder: Path, kind: Kind, *, overwrite: bool = False, inputs: Iterable[Input] = ()
) -> Iterator[Output]:
    """Claim an output folder, yield a scratch folder, and move that into place at the end.

    On entry all reasons that would prevent writing are checked, the folder is locked against other
    processes, and leftovers of killed ones are cleaned up. If the block or a part of the output
    fails, complete files are kept in ``FOLDER.incomplete``; after an interruption none are.

    Args:
        folder: The output folder.
        kind: The command that writes it.
        overwrite: Replace a former result once the new one is complete.
        inputs: Files and folders that the output must not overlap.

    Raises:
        OutputError: The folder cannot be written, or exists and may not be replaced.
        WriteError: Writing failed, and no file is complete.
        IncompleteError: Something failed, and complete files were kept.
    """
    inputs = tuple(inputs)
    place = resolve_output(folder, inputs)
    with ExitStack() as stack:
        stack.enter_context(_parents(place.target))
        locks = _lock(stack, place)
        sweep_temporary()
        _clear_up(place, locks=locks)
        # Another process may have changed it before the lock was taken.
        place = resolve_output(folder, inputs)
        refuse_existing(place, overwrite=overwrite)
        work = _work(place)
        try:
            yield from _written(work, place, kind, overwrite)
        finally:
            # Without its record it contains what could not be moved out of it.
            if (work.path / RECORD).exists() and (finished(work, place) or not work.holds_former):
                work.remove()


def _written(work: Work, place: Place, kind: Kind, overwrite: bool) -> Iterator[Output]:
    output = Output(place.named, work.result)
    try:
        yield output
        share(work.result)
        if not output.failed:
            mark(work.result, kind)
            refuse_existing(place, overwrite=overwrite)
            take_place(work, place)
            return
    except Exception as error:
        _give_up(output, error, work, place, kind)
        raise
    _give_up(output, None, work, place, kind)


def _give_up(output: Output, error: Exception | None, work: Work, place: Place, kind: Kind) -> None:
    """Keep complete files and raise the error.

    Args:
        output: The output, with its failed parts.
        error: The exception of the block; None where only parts failed.
        work: The scratch folder.
        place: The output.
        kind: The command.
    """
    story = [f"{name} failed: {_reason(one)}" for name, one in output.failed.items()]
    if error is not None:
        story.append(_reason(error))
    cause = error or next(iter(output.failed.values()))
    if work.holds_former:
        # It could not be restored, so the whole scratch folder is kept for that.
        story.append(f"the former result lies in {work.path}; the next start puts it back")
        raise IncompleteError("\n".join(story), kept=work.result) from cause
    kept = _keep(work, place, kind, story)
    if kept is None:
        if isinstance(cause, OSError) and cause.errno is not None:
            raise write_error(place.named, cause) from cause
        raise cause
    listed = ", ".join(name for name in names(kept) if name != MARKER)
    story.append(f"what is whole lies in {kept}: {listed}")
    if error is not None and not isinstance(error, SlmError | OSError):
        # A bug or lack of memory must reach the caller.
        say(story[-1])
        raise error
    raise IncompleteError("\n".join(story), kept=kept) from cause


def _keep(work: Work, place: Place, kind: Kind, story: Sequence[str]) -> Path | None:
    """Move complete files to ``FOLDER.incomplete``; None where there are none."""
    for name in names(work.result):
        # A hidden name marks an unfinished file.
        if name.startswith("."):
            remove(work.result / name)
    whole = names(work.result)
    if not whole:
        return None
    lines = [f"This is not the whole result of `slm-plugin {kind}` for {place.named}.", *story]
    with suppress(SlmError, OSError):
        # On a full disk the name says it, too.
        write_text(work.result / INCOMPLETE, "\n".join([*lines, f"Whole: {', '.join(whole)}", ""]))
        mark(work.result, kind, incomplete=True)
    near = place.target / INSIDE if place.inside else place.target
    kept = free_name(near, "incomplete")
    try:
        work.result.rename(kept)
    except OSError:
        with suppress(OSError):
            (work.path / RECORD).unlink()
        return work.result
    return kept


def _reason(error: Exception) -> str:
    """An error as one line."""
    if isinstance(error, SlmError):
        return " ".join(str(error).split())
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return " ".join(f"{type(error).__name__}: {error}".split())


@contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Delete empty folders above an output that was not written."""
    missing = [path for path in target.parents if not path.exists()]
    try:
        yield
    finally:
        for path in missing:
            with suppress(OSError):
                path.rmdir()


def _lock(stack: ExitStack, place: Place) -> bool:
    beside = place.target.with_name(f".{place.target.name}{LOCK}")
    file = place.target / LOCK if place.inside else beside
    for _ in range(_TRIES):
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            return stack.enter_context(locked(file, place.target, place.named))
        except FileNotFoundError:
            # Another process that ended has just deleted the empty folders above its output.
            continue
        except OSError as error:
            if os.path.lexists(file) and not file.is_file():
                raise OutputError(
                    f"{file} is in the way of the lock of {place.named}", hint="move it elsewhere"
                ) from error
            raise _unwritable(file.parent, error) from error
    raise OutputError(f"cannot write into {file.parent}", hint=ELSEWHERE)


def _clear_up(place: Place, *, locks: bool) -> None:
    """Clean up what killed processes left of this output."""
    for work in works(*scratch_names(place)):
        ended = dead(work, locked=locks)
        if ended or locks:
            try:
                back = put_back(work, place)
            except (OSError, ValueError) as error:
                raise OutputError(
                    f"cannot put back the former result of {place.named} from {work.path}: {error}",
                    hint="move it back by hand",
                ) from error
            if back is not None:
                say(f"a run that was killed had moved the former result away; it is back at {back}")
        if ended:
            work.remove()
        else:
            say(f"left alone: {work.path}, which another machine may still be writing")


def _work(place: Place) -> Work:
    parent, start, name = scratch_names(place)
    try:
        return make_work(parent, start, name)
    except OSError as error:
        raise _unwritable(parent, error) from error


def _unwritable(folder: Path, error: OSError) -> OutputError:
    return OutputError(f"cannot write into {folder}: {error.strerror or error}", hint=ELSEWHERE)
