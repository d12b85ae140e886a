"""Standard streams that never raise, so that a broken terminal does not end a run."""

from __future__ import annotations

import codecs
import errno
import io
import os
import select
import sys
from typing import Any, TextIO

from typing_extensions import Buffer

_READABLE = "slm_plugin_readable"
_WIDEST = 1000
_ASCII = {
    "\N{HORIZONTAL ELLIPSIS}": "...",
    "\N{EN DASH}": "-",
    "\N{EM DASH}": "-",
    "\N{MINUS SIGN}": "-",
    "\N{PLUS-MINUS SIGN}": "+/-",
    "\N{MULTIPLICATION SIGN}": "x",
    "\N{RIGHTWARDS ARROW}": "->",
    "\N{LEFT SINGLE QUOTATION MARK}": "'",
    "\N{RIGHT SINGLE QUOTATION MARK}": "'",
    "\N{LEFT DOUBLE QUOTATION MARK}": '"',
    "\N{RIGHT DOUBLE QUOTATION MARK}": '"',
    "\N{BULLET}": "*",
    "\N{MIDDLE DOT}": "*",
}
_HORIZONTAL = frozenset("─━┄┅┈┉╌╍═╴╶╸╺╼╾")
_VERTICAL = frozenset("│┃┆┇┊┋╎╏║╵╷╹╻╽╿")


class ForgivingFile(io.RawIOBase):
    """A file descriptor that records the first write error and discards all later data.

    Attributes:
        error: The first error; None while writing works.

    Args:
        descriptor: An open file descriptor.
    """

    def __init__(self, descriptor: int) -> None:
        self.error: OSError | None = None
        self._descriptor = descriptor
        self._terminal = os.isatty(descriptor)

    def write(self, data: Buffer, /) -> int:
        """Write data; after a failure all of it counts as written."""
        view = memoryview(data)
        while self.error is None:
            try:
                return os.write(self._descriptor, view)
            except BlockingIOError:
                select.select([], [self._descriptor], [])
            except OSError as error:
                self.error = error
                # Output of C libraries and child processes is discarded, too.
                _to_null(self._descriptor)
        return view.nbytes

    def writable(self) -> bool:
        """It takes bytes."""
        return True

    def close(self) -> None:
        """Stay open."""

    def fileno(self) -> int:
        """The descriptor."""
        return self._descriptor

    def isatty(self) -> bool:
        """Whether it was a terminal when the process began."""
        return self._terminal

    @property
    def reader_left(self) -> bool:
        """Whether it failed because the reader closed the pipe, as ``| head`` does."""
        number = None if self.error is None else self.error.errno
        hung_up = self._terminal and number == errno.EIO
        return hung_up or number in (errno.EPIPE, errno.ECONNRESET)


class LastingBuffer(io.BufferedWriter):
    """The buffer of such a stream."""

    def close(self) -> None:
        """Write out what is held back."""
        self.flush()


class LastingStream(io.TextIOWrapper):
    """A standard stream that stays open even if a library closes it."""

    def close(self) -> None:
        """Write out what is held back."""
        self.flush()

    def detach(self) -> Any:
        """The buffer, which this stream keeps."""
        self.flush()
        return self.buffer


def prepare_streams() -> None:
    """Replace standard output and standard error by streams that do not raise.

    A stream that the parent closed becomes ``/dev/null``, so that a file opened later does not get
    its descriptor, to which C libraries write.
    """
    codecs.register_error(_READABLE, _readable)
    if os.environ.get("COLUMNS", "").isdecimal():
        # Tables are padded to the width; an absurd one would fill the disk with blanks.
        os.environ["COLUMNS"] = str(min(int(os.environ["COLUMNS"][:9]), _WIDEST))
    for descriptor in (0, 1, 2):
        try:
            os.fstat(descriptor)
        except OSError:
            _to_null(descriptor)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    # A stream that the caller has replaced, as in tests, is kept.
    if sys.stdout is sys.__stdout__:
        sys.stdout = _forgiving(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _forgiving(sys.stderr, 2)


def failure_of(stream: TextIO) -> str:
    """The write error of a stream; empty without one, or when the reader closed the pipe."""
    try:
        stream.flush()
    except (OSError, ValueError):
        return ""
    raw = getattr(getattr(stream, "buffer", None), "raw", None)
    if not isinstance(raw, ForgivingFile) or raw.error is None or raw.reader_left:
        return ""
    return raw.error.strerror or str(raw.error)


def _forgiving(stream: TextIO | None, descriptor: int) -> TextIO:
    encoding = getattr(stream, "encoding", None) or "utf-8"
    try:
        "\N{HORIZONTAL ELLIPSIS} a.\udc80".encode(encoding, _READABLE)
    except (UnicodeError, LookupError):
        encoding = "ascii"
    if os.name == "nt" and isinstance(stream, io.TextIOWrapper):
        # The console of Windows has a file of its own kind.
        stream.reconfigure(errors=_READABLE)
        return stream
    raw = ForgivingFile(descriptor)
    return LastingStream(
        LastingBuffer(raw),
        encoding=encoding,
        errors=_READABLE,
        line_buffering=descriptor == 2 or raw.isatty(),
    )


def _to_null(descriptor: int) -> None:
    null = os.open(os.devnull, os.O_RDWR)
    if null != descriptor:
        os.dup2(null, descriptor)
        os.close(null)


def _readable(error: UnicodeError) -> tuple[str, int]:
    """Replacements for characters that an encoding lacks."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(map(_in_ascii, error.object[error.start : error.end])), error.end


def _in_ascii(char: str) -> str:
    code = ord(char)
    if char in _ASCII:
        return _ASCII[char]
    if 0x2500 <= code < 0x2580:
        return "-" if char in _HORIZONTAL else "|" if char in _VERTICAL else "+"
    if 0x2580 <= code < 0x25A0:
        return "#"
    if 0x2800 <= code < 0x2900:  # the spinner's dots
        return "*"
    return char.encode("ascii", "backslashreplace").decode("ascii")
