"""Text that a user names, read whole within bounds, and text as one line of a message shows it."""

from __future__ import annotations

import os
import select
import stat
from pathlib import Path
from typing import TYPE_CHECKING

from slm_plugin.control_characters import visible
from slm_plugin.errors import UserError

if TYPE_CHECKING:
    from pydantic import ValidationError

# Whoever writes into a pipe is waited for so long, in seconds, as long as nothing comes.
PATIENCE = 30.0
_CHUNK = 1 << 20
# What a path raises beside OSError: a null byte; a lone surrogate.
PATH_ERRORS = (OSError, ValueError)


def read_text(path: Path, what: str, error: type[UserError], most: int) -> str:
    """A UTF-8 text, without a byte order mark.

    A pipe is read to its end, once: it cannot be read again.

    Args:
        path: A file or a pipe.
        what: What messages call it, as ``the recipe``.
        error: What is raised.
        most: Bytes that it may have.

    Raises:
        UserError: As ``error``: it cannot be read, is larger, or is no UTF-8 text.
    """
    content = _content(path, what, error, most)
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise error(
            f"cannot read {what} {shown_path(path)}: it is UTF-16, not UTF-8 text",
            hint="save it as UTF-8",
        )
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as wrong:
        line = content.count(b"\n", 0, wrong.start) + 1
        raise error(
            f"cannot read {what} {shown_path(path)}: it is not UTF-8 text (line {line})",
            hint="save it as UTF-8",
        ) from wrong


def reason(error: Exception) -> str:
    """Why a path cannot be used, in a few words."""
    return getattr(error, "strerror", None) or "its name has characters that no file name can have"


def expanded(path: str) -> Path:
    """A path with ``~`` or ``~name`` replaced by the home directory.

    Raises:
        ValueError: There is no such user, or no file can have such a name.
    """
    if not path.isprintable():
        raise ValueError(f"'{shown(path)}' has characters that no path should have")
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = shown(Path(path).parts[0])
        raise ValueError(
            f"the home directory of '{user}' is not known; write the whole path, or "
            f"'./{user}' for a file of that name"
        ) from None


def regular_file(path: Path) -> str:
    """Why a path is no file that can be read twice; empty where it is one."""
    try:
        found = path.stat()
    except FileNotFoundError:
        return f"there is no file {shown_path(path)}"
    except PATH_ERRORS as error:
        return f"cannot read {shown_path(path)}: {reason(error)}"
    if stat.S_ISDIR(found.st_mode):
        return f"{shown_path(path)} is a folder, not a file"
    if not stat.S_ISREG(found.st_mode):
        return f"{shown_path(path)} is a pipe or a device, not a file; write its content to a file"
    if not os.access(path, os.R_OK):
        return f"cannot read {shown_path(path)}: Permission denied"
    return ""


def shown(value: object, most: int = 72) -> str:
    """A text as one line of a message shows it: without control characters, and not too long."""
    text = str(value)
    cut = text if len(text) <= most else text[: most - 1] + "…"
    return visible(cut)


def first_problem(error: ValidationError) -> str:
    """The first of what a schema found wrong, with its place, and how much more there is."""
    first = error.errors()[0]
    place = shown(".".join(str(part) for part in first["loc"])) or "top level"
    more = f"; {error.error_count() - 1} more" if error.error_count() > 1 else ""
    return f"{place}: {shown(first['msg'], 200)}{more}"


def shown_path(path: Path | str) -> str:
    """A path as one line of a message shows it, whole: it may be copied."""
    return shown(path, 4096)


def _content(path: Path, what: str, error: type[UserError], most: int) -> bytes:
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    parts: list[bytes] = []
    total = 0
    try:
        descriptor = os.open(path, flags)
        try:
            while total <= most:
                if not _ready(descriptor):
                    raise error(
                        f"cannot read {what} {shown_path(path)}: nothing came from it "
                        f"for {PATIENCE:g} seconds"
                    )
                part = os.read(descriptor, min(_CHUNK, most + 1 - total))
                if not part:
                    return b"".join(parts)
                parts.append(part)
                total += len(part)
        finally:
            os.close(descriptor)
    except PATH_ERRORS as failure:
        raise error(f"cannot read {what} {shown_path(path)}: {reason(failure)}") from failure
    raise error(f"cannot read {what} {shown_path(path)}: it is larger than {_size(most)}")


def _ready(descriptor: int) -> bool:
    """Whether something, or the end, can be read; a pipe is waited for."""
    if stat.S_ISREG(os.fstat(descriptor).st_mode) or os.name != "posix":
        return True
    return bool(select.select([descriptor], [], [], PATIENCE)[0])


def _size(octets: int) -> str:
    return f"{octets >> 20} MB" if octets >> 20 else f"{octets >> 10} kB"
