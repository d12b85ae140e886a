"""Signals that ask the process to end, turned into one exception in the main thread.

A handler of Python may run between any two steps of the main thread, also where an exception is
lost or does harm: while a module is imported, in a finaliser, while a child process or a scratch
folder comes into being. There it waits; everywhere else it raises `Interrupted`, so that context
managers clean up. While they do, further signals change nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from _thread import interrupt_main, start_new_thread
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGHUP")
SIGNALS = tuple(getattr(signal, name) for name in _NAMES if hasattr(signal, name))
# Nothing that waits may wait longer: a plugin may sleep while it is imported.
_PATIENCE = 10.0
_IMPORTING = ("<frozen importlib._bootstrap>", "<frozen importlib._bootstrap_external>")
# Code that must not stop half way: what it made would be known to nobody.
_WHOLE = ("tempfile", "weakref", "_weakrefset", "slm_plugin.files")
_OUTPUTS = "slm_plugin.outputs"
# The only places of `subprocess` where its own clean-up knows the child.
_WAITING = frozenset(
    {"communicate", "_communicate", "wait", "_wait", "_try_wait", "_check_timeout"}
)


class Interrupted(BaseException):
    """The process was asked to end; no ``Exception``, so that no library takes it for a failure.

    Args:
        signum: The signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


@dataclass(slots=True)
class _State:
    """What is known of the first signal, and whether an exception may be raised now."""

    installed: bool = False
    finished: bool = False
    signum: int | None = None
    since: float = 0.0
    told: Callable[[], str] = str


_state = _State()


def install(line: Callable[[], str]) -> None:
    """Handle the signals from now on; one that the parent had ignored stays ignored.

    Args:
        line: What to print where the process ends at once, which it does while the command line
            imports its parts: nothing has been begun by then.
    """
    global _state
    if threading.current_thread() is not threading.main_thread():
        return
    _state = _State(installed=True, told=line)
    sys.unraisablehook = _unraisable
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=_forked)
    for signum in SIGNALS:
        # `nohup` and a shell's `&` ignore signals on purpose.
        if signal.getsignal(signum) is not signal.SIG_IGN:
            signal.signal(signum, _handle)


def received() -> int | None:
    """The exit code that the first signal asks for; None when there was none."""
    return None if _state.signum is None else 128 + _state.signum


def is_by_signal(error: BaseException) -> bool:
    """Whether an exception was caused by a signal, and not raised by somebody's own code.

    Where somebody else handles Ctrl-C, nobody can tell: then it is taken for one.
    """
    if not isinstance(error, KeyboardInterrupt | Interrupted):
        return False
    handler = signal.getsignal(signal.SIGINT)
    return _state.signum is not None or handler not in (_handle, signal.SIG_IGN)


def raise_if_received(error: BaseException) -> None:
    """An error that comes after a signal is what some library made of the interruption.

    Raises:
        Interrupted: There was a signal.
    """
    if _state.signum is not None:
        raise Interrupted(_state.signum) from error


def finish() -> None:
    """The command is over and its exit code is decided: no signal changes anything any more."""
    _state.finished = True
    if _state.installed:
        for signum in SIGNALS:
            if signal.getsignal(signum) is _handle:
                signal.signal(signum, signal.SIG_IGN)


def _handle(signum: int, frame: FrameType | None) -> None:
    if _state.finished:
        return
    if _state.signum is None:
        _state.signum, _state.since = signum, time.monotonic()
        # A library may swallow the exception, and what waits has to be asked again.
        start_new_thread(_insist, (_state, threading.main_thread().ident or 0))
    if _unwinding():
        return
    importer = _importer(frame)
    if importer is not None and importer.split(".")[:2] == ["slm_plugin", "cli"]:
        _end_at_once()
    late = time.monotonic() - _state.since > _PATIENCE
    if late or not (importer is not None or _in_whole(frame)):
        raise Interrupted(_state.signum)


def _unwinding() -> bool:
    """Whether the code that runs now cleans up after an interruption."""
    error, seen = sys.exc_info()[1], set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Interrupted):
            return True
        seen.add(id(error))
        error = error.__context__
    return False


def _importer(frame: FrameType | None) -> str | None:
    """The module whose import statement runs, the outermost of several; None without any."""
    found, inside = None, False
    while frame is not None:
        importing = frame.f_code.co_filename in _IMPORTING
        if inside and not importing:
            found = str(frame.f_globals.get("__name__", ""))
        inside = importing
        frame = frame.f_back
    return found


def _in_whole(frame: FrameType | None) -> bool:
    """Whether code runs that has to come to its end."""
    child = True
    while frame is not None:
        module, function = str(frame.f_globals.get("__name__")), frame.f_code.co_name
        if function == "__del__" or module in _WHOLE or module.startswith(_OUTPUTS):
            return True
        if module == "subprocess" and child:
            child = False
            if function not in _WAITING:
                return True
        frame = frame.f_back
    return False


def _end_at_once() -> None:
    try:
        os.write(2, f"error: {_state.told()}\n".encode("ascii", "backslashreplace"))
    finally:
        os._exit(received() or 1)


def _insist(state: _State, main_thread: int) -> None:
    """Send the signal again and again until the command is over, each time a little later."""
    pause = 0.05
    while not state.finished and state.signum is not None:
        time.sleep(pause)
        pause = min(1.0, pause * 1.5)
        if not state.finished:
            if hasattr(signal, "pthread_kill"):
                signal.pthread_kill(main_thread, state.signum)
            else:
                interrupt_main(signal.Signals(state.signum))


def _unraisable(unraisable: Any) -> None:
    """An interruption that a callback could not pass on is raised again elsewhere, not printed."""
    if not isinstance(unraisable.exc_value, Interrupted | BrokenPipeError):
        sys.__unraisablehook__(unraisable)


def _forked() -> None:
    """A forked worker is its parent's to end, and ends without a word."""
    if _state.installed:
        _state.finished = True
        for signum in SIGNALS:
            if signal.getsignal(signum) in (_handle, signal.SIG_IGN):
                signal.signal(signum, signal.SIG_DFL)
