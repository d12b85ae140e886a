"""Text files appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from slm_plugin.errors import OutputError
from slm_plugin.files import write_text


def test_a_text_file_is_written_by_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When writing fails, the old file is unharmed and no scratch file stays."""
    path = tmp_path / "file"
    write_text(path, "old")

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match="cannot write") as told:
        write_text(path, "new")
    assert told.value.exit_code == 1
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_a_written_file_has_the_permissions_of_the_umask(
    tmp_path: Path, umask: int, mode: int
) -> None:
    """Neither the privacy of a temporary file nor more than the user wants."""
    former = os.umask(umask)
    try:
        write_text(tmp_path / "a.txt", "a")
    finally:
        os.umask(former)
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == mode
