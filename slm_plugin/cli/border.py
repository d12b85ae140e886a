"""Conversion of exceptions to messages and exit codes, in one place.

The package's own errors have messages. Exceptions of libraries are listed here by kind, with their
meaning for a user. All others are internal errors.
"""

from __future__ import annotations

import errno
import os
import traceback
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import ValidationError

from slm_plugin import interruption
from slm_plugin.cli import outcome
from slm_plugin.errors import SlmError
from slm_plugin.interruption import Interrupted


@dataclass(frozen=True, slots=True)
class Told:
    """The report of an exception to the user.

    Attributes:
        message: The error, one line per mistake.
        code: 1 for a failed run, 2 for a user's error, 128 and more for a signal.
        hint: The remedy.
        usage: The usage line, after a wrong call.
    """

    message: str
    code: int
    hint: str = ""
    usage: str = ""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of library exception.

    Attributes:
        names: Classes by name, so that no library is imported for the check.
        message: The message; ``{reason}`` is the first line of the exception's text.
        code: Exit code.
        hint: What to do about it.
        words: Lower-case substrings, one of which the text must have; empty accepts any.
        numbers: Error numbers of the system that are of this kind, too.
    """

    names: frozenset[str]
    message: str
    code: int
    hint: str = ""
    words: tuple[str, ...] = ()
    numbers: tuple[int, ...] = ()

    def covers(self, error: BaseException) -> bool:
        """Whether an exception is of the kind."""
        if isinstance(error, OSError) and error.errno in self.numbers:
            return True
        if self.names.isdisjoint(cls.__name__ for cls in type(error).__mro__):
            return False
        said = str(error).lower()
        return not self.words or any(word in said for word in self.words)


def _named(*names: str) -> frozenset[str]:
    return frozenset(names)


_ANY = _named("Exception")
_MEMORY = Kind(
    _named("MemoryError", "OutOfMemoryError"),
    "out of memory",
    1,
    "use `memory: layerwise`, bfloat16, or fewer or shorter calibration samples",
)
# The first match counts.
KINDS = (
    _MEMORY,
    Kind(
        _named("RuntimeError", "OSError", "SystemError", "SafetensorError"),
        _MEMORY.message,
        1,
        _MEMORY.hint,
        (
            "allocate memory",
            "out of memory",
            "not enough memory",
            "bad_alloc",
            "bad allocation",
            "storage size calculation overflowed",
        ),
        (errno.ENOMEM,),
    ),
    Kind(
        _ANY,
        "the disk is full: {reason}",
        1,
        "free some space, or name another folder for the output, the cache or TMPDIR",
        ("no space left", "disk quota exceeded", "os error 28", "os error 122"),
        (errno.ENOSPC, errno.EDQUOT),
    ),
    Kind(
        _ANY,
        "too many files are open: {reason}",
        1,
        "raise the limit with `ulimit -n`",
        ("too many open files", "os error 24"),
        (errno.EMFILE, errno.ENFILE),
    ),
    Kind(
        _named("RecursionError"),
        "the input is nested too deeply: {reason}",
        2,
        "SLM_PLUGIN_TRACEBACK=1 shows what was being read",
    ),
    Kind(
        _named("AcceleratorError", "RuntimeError", "NotImplementedError", "AssertionError"),
        "the device failed: {reason}",
        1,
        "set `device: cpu`, or check whether PyTorch works on that device",
        (
            "cuda",
            "cudnn",
            "cublas",
            "nvidia driver",
            "hip error",
            "mps backend",
            "mps device",
            "xpu",
            "device-side assert",
            "expected all tensors to be on the same device",
        ),
    ),
    Kind(
        _named("RuntimeError", "OverflowError"),
        "a number is too large to compute with: {reason}",
        2,
        "lower it",
        (
            "cannot be converted to type",
            "int too big",
            "int too large",
            "too large to convert",
            "result too large",
        ),
    ),
    Kind(
        _named("UnicodeError"),
        "text that cannot be read or written in its encoding: {reason}",
        2,
        "save the file as UTF-8",
    ),
    Kind(_named("YAMLError"), "this is not valid YAML: {reason}", 2),
    Kind(_named("JSONDecodeError", "TOMLDecodeError"), "this is not valid JSON: {reason}", 2),
    Kind(_named("ValidationError"), "this does not fit its schema: {reason}", 2),
    Kind(_named("TemplateError"), "a chat template cannot be used: {reason}", 2),
    Kind(
        _named("SafetensorError", "BadZipFile", "UnpicklingError", "EOFError", "LZMAError"),
        "a file is damaged or cut short: {reason}",
        1,
        "fetch or write the file again",
    ),
    Kind(
        _named("HfHubHTTPError", "HFValidationError", "EntryNotFoundError", "OfflineModeIsEnabled"),
        "the Hub cannot be reached: {reason}",
        2,
        "check the name and the network, or use a local folder",
    ),
    Kind(
        _named("ConnectionError", "RequestException", "HTTPError", "HTTPException", "gaierror"),
        "the network failed: {reason}",
        1,
        "check the network, or use local files",
    ),
    Kind(_named("TimeoutError"), "timed out: {reason}", 1, "try again"),
    Kind(
        _named("ImportError"),
        "a package cannot be imported: {reason}",
        1,
        "`slm-plugin doctor` shows installed and required versions",
    ),
    Kind(_named("SubprocessError"), "a child process failed: {reason}", 1),
    Kind(_named("BrokenExecutor"), "a child process failed: {reason}", 1),
)
# Errors that a user can fix by another name or other permissions.
_MENDED_BY_USER = frozenset(
    {
        errno.EACCES,
        errno.EEXIST,
        errno.EISDIR,
        errno.ELOOP,
        errno.ENAMETOOLONG,
        errno.ENOENT,
        errno.ENOTDIR,
        errno.EPERM,
        errno.EROFS,
    }
)


_CTRL_C = 130


def border(command: Callable[[], object]) -> int:
    """Run a command and report every failure as one message.

    Args:
        command: Returns an exit code, or anything else on success.

    Returns:
        The exit code. Never 0 after an exception.

    Raises:
        Interrupted: A signal asked the process to end.
    """
    from slm_plugin.progress import complain, finish_bars, say

    try:
        code = command()
    except Interrupted:
        raise
    except BaseException as error:
        finish_bars()
        interruption.raise_if_received(error)
        told = tell(error)
        if told.usage:
            say(told.usage)
        complain(told.message, told.hint)
        return told.code
    if code == _CTRL_C:
        # Typer swallows a KeyboardInterrupt and returns its code.
        complain(outcome.interrupted_line())
    return code if isinstance(code, int) else 0


def tell(error: BaseException) -> Told:
    """The report of any exception."""
    if isinstance(error, SlmError):
        return Told(error.message or type(error).__name__, error.exit_code, error.hint)
    if isinstance(error, KeyboardInterrupt | Interrupted):
        return Told(outcome.interrupted_line(), getattr(error, "exit_code", _CTRL_C))
    if isinstance(error.__cause__, EOFError) and type(error).__name__ == "Abort":
        # Typer's exception for an end of file in a library.
        return tell(error.__cause__)
    if isinstance(error, SystemExit | GeneratorExit):
        asked = f" with {error.code!r}" if isinstance(error, SystemExit) else ""
        return Told(f"a library wanted to end the process{asked}", 1, _SHOW)
    usage = _usage(error)
    if usage is not None:
        return usage
    if os.environ.get("SLM_PLUGIN_TRACEBACK"):
        from slm_plugin.progress import say

        for line in "".join(traceback.format_exception(error)).splitlines():
            say(line)
    return _by_kind(error) or Told(
        f"internal error: {type(error).__name__}: {_reason(error)}", 1, f"{_SHOW}; please report it"
    )


_SHOW = "SLM_PLUGIN_TRACEBACK=1 shows where"


def _by_kind(error: BaseException) -> Told | None:
    reason = _reason(error)
    for kind in KINDS:
        if kind.covers(error):
            return Told(kind.message.format(reason=reason), kind.code, kind.hint)
    if isinstance(error, OSError):
        mended = error.errno in _MENDED_BY_USER
        return Told(f"the system refused: {reason}", 2 if mended else 1)
    return None


def _usage(error: BaseException) -> Told | None:
    """A command line that cannot be read; Typer does not export the class of these errors."""
    format_message, code = getattr(error, "format_message", None), getattr(error, "exit_code", None)
    if not callable(format_message) or not isinstance(code, int):
        return None
    context = getattr(error, "ctx", None)
    usage = context.get_usage() if context is not None else ""
    path = context.command_path if context is not None else "slm-plugin"
    return Told(
        format_message() or "the command cannot be read", code or 2, f"see `{path} --help`", usage
    )


def _reason(error: BaseException) -> str:
    """The first line of an exception's text, or its class if it has none."""
    if isinstance(error, OSError) and error.strerror:
        named = "" if error.filename is None else f": {_name(error.filename)}"
        return f"{error.strerror}{named}"
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        return f"{place}: {first['msg']}" if place else str(first["msg"])
    lines = str(error).strip().splitlines()
    return lines[0].strip() if lines else type(error).__name__


def _name(filename: object) -> str:
    return os.fsdecode(filename) if isinstance(filename, bytes) else str(filename)
