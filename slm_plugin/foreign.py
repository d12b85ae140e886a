"""Code that others wrote: whatever it raises is one error that names whose code it is."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from slm_plugin.errors import SlmError


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
) -> Iterator[None]:
    """Turn what foreign code raises, an exit of the whole process included, into one error.

    Errors of this package pass, which foreign code may raise as well, and so do an interruption
    by the user and the end of memory. With ``SLM_PLUGIN_TRACEBACK`` set the traceback is shown.

    Args:
        what: What the message begins with: whose code did what.
        kind: The error's class.
        hint: What to do about it.
        passing: What the caller expects and deals with itself.

    Raises:
        SlmError: Of the class ``kind``.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        if isinstance(error, passing):
            raise
        # An error of ours that foreign code made may carry any exit code, even 0. The package's
        # own interruption by a signal is no SlmError and passes like Ctrl-C.
        ours = error.exit_code in (1, 2) if isinstance(error, SlmError) else is_ours(error)
        if ours or is_out_of_memory(error):
            raise
        if os.environ.get("SLM_PLUGIN_TRACEBACK"):
            traceback.print_exc(file=sys.stderr)
        raise kind(f"{what}: {reason(error)}", hint=hint) from error


def reason(error: BaseException) -> str:
    """Kind and first line of what was raised, whatever its own code does."""
    lines = _text(error).strip().splitlines()
    name = type(error).__name__
    return f"{name}: {lines[0][:300]}" if lines else name


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return ""
