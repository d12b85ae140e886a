"""Code that others wrote: what it raises is one error that names it, what it leaves is undone."""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from slm_plugin import interruption
from slm_plugin.control_characters import visible
from slm_plugin.errors import SlmError

_STREAMS = {
    "stdin": "standard input",
    "stdout": "standard output",
    "stderr": "standard error",
}


def is_ours(thing: object) -> bool:
    """Whether a class, or the class of an object, is part of this package."""
    cls = thing if isinstance(thing, type) else type(thing)
    return str(cls.__module__).partition(".")[0] == "slm_plugin"


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, which is nobody's fault; PyTorch has classes of its own for it."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or "allocate memory" in _text(error)


@contextmanager
def contained(
    what: str,
    kind: type[SlmError] = SlmError,
    hint: str = "",
    passing: tuple[type[BaseException], ...] = (),
    *,
    computes: bool = True,
) -> Iterator[None]:
    """Turn what foreign code raises, an exit of the whole process included, into one error.

    Errors of this package pass, which foreign code may raise as well, and so do an interruption
    by the user and the end of memory. With ``SLM_PLUGIN_TRACEBACK`` set the traceback is shown.

    Args:
        what: What the message begins with: whose code did what.
        kind: The error's class.
        hint: What to do about it.
        passing: What the caller expects and deals with itself.
        computes: Whether the code computes; what runs out of memory otherwise is at fault.

    Raises:
        SlmError: Of the class ``kind``.
    """
    try:
        yield
    except BaseException as error:
        if isinstance(error, passing) or interruption.is_by_signal(error):
            raise
        if (computes and is_out_of_memory(error)) or _is_one_of_ours(error):
            raise
        if os.environ.get("SLM_PLUGIN_TRACEBACK"):
            traceback.print_exc(file=sys.stderr)
        raise kind(f"{what}: {reason(error)}", hint=hint) from error


@contextmanager
def undone() -> Iterator[list[str]]:
    """Put back what foreign code changes of the process: the folder, streams, signal handlers.

    Yields:
        A list that holds, afterwards, what had to be put back, in words.
    """
    folder = _folder()
    streams = {name: getattr(sys, name) for name in _STREAMS}
    handlers = {signum: signal.getsignal(signum) for signum in interruption.SIGNALS}
    put_back: list[str] = []
    try:
        yield put_back
    finally:
        if folder and _folder() != folder:
            with suppress(OSError):
                os.chdir(folder)
                put_back.append("working directory")
        for name, stream in streams.items():
            if getattr(sys, name, None) is not stream:
                setattr(sys, name, stream)
                put_back.append(_STREAMS[name])
        if threading.current_thread() is threading.main_thread():
            for signum, handler in handlers.items():
                # None is a handler that is not Python's, and that Python cannot set.
                if handler is not None and signal.getsignal(signum) is not handler:
                    signal.signal(signum, handler)
                    put_back.append(f"handler of {signal.Signals(signum).name}")


def says_one_line(error: SlmError) -> bool:
    """Whether an error that foreign code may have made can be told, once it is a single line.

    It may carry any exit code, even 0, and a message that is no text.
    """
    try:
        if type(error.exit_code) is not int or error.exit_code not in (1, 2):
            return False
        error.message, error.hint = _line(error.message), _line(error.hint)
        return bool(error.message)
    except Exception:
        return False


def reason(error: BaseException) -> str:
    """Kind and first line of what was raised, whatever its own code does."""
    lines = _text(error).strip().splitlines()
    name = visible(type(error).__name__)
    return f"{name}: {visible(lines[0][:300])}" if lines else name


def _is_one_of_ours(error: BaseException) -> bool:
    if isinstance(error, SlmError):
        return says_one_line(error)
    return is_ours(error) and not isinstance(error, interruption.Interrupted)


def _line(text: str) -> str:
    return visible(" ".join(text.split()))


def _folder() -> str:
    """The working directory; empty where it is no more."""
    try:
        return os.getcwd()  # noqa: PTH109 - a path object would add nothing
    except OSError:
        return ""


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException as wrong:
        if interruption.is_by_signal(wrong):
            raise
        return ""
