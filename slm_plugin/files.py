"""Atomic writing of text files."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from slm_plugin.errors import WriteError


def write_text(path: Path, text: str) -> None:
    """Write a text file by rename.

    Raises:
        OutputError: The file cannot be written.
    """
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Not by tempfile, which lets nobody else read: a result has the permissions that the
            # user's umask gives it.
            with scratch.open("x", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except BaseException:
            scratch.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise WriteError(
            f"cannot write {path}: {error.strerror or error}",
            hint="check the free disk space and the permissions",
        ) from error
