"""Outputs appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from slm_plugin.errors import OutputError
from slm_plugin.files import check_free, whole_folder, write_text


def test_a_folder_appears_when_its_block_succeeds(tmp_path: Path) -> None:
    """Inside the block the folder does not exist; afterwards it is complete."""
    target = tmp_path / "a" / "out"
    with whole_folder(target) as scratch:
        (scratch / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert [p.name for p in target.parent.iterdir()] == ["out"]


def test_a_failed_block_leaves_nothing(tmp_path: Path) -> None:
    """An error in the block removes the scratch folder and passes on."""
    with pytest.raises(RuntimeError, match="boom"), whole_folder(tmp_path / "out") as scratch:
        (scratch / "file").write_text("x")
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_replaced_only_when_allowed(tmp_path: Path) -> None:
    """Without overwrite it is refused; with it, the old one stays until the new one is whole."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(OutputError, match="--overwrite"):
        check_free(target, overwrite=False)
    with whole_folder(target, overwrite=True) as scratch:
        (scratch / "new").write_text("new")
        assert (target / "old").exists()
    assert [p.name for p in target.iterdir()] == ["new"]
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_failed_replacement_keeps_the_old_folder(tmp_path: Path) -> None:
    """The old output survives a run that fails."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(ValueError), whole_folder(target, overwrite=True):
        raise ValueError
    assert (target / "old").read_text() == "old"


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path) -> None:
    """A partial folder of a dead process goes, that of a living one stays."""
    dead, alive = tmp_path / ".out.partial-999999999-x", tmp_path / f".out.partial-{os.getpid()}-x"
    dead.mkdir()
    alive.mkdir()
    with whole_folder(tmp_path / "out"):
        pass
    assert not dead.exists()
    assert alive.exists()


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    """ENOSPC inside the block becomes an OutputError that names the folder."""
    with pytest.raises(OutputError, match="No space left"), whole_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_the_way_is_refused(tmp_path: Path) -> None:
    """An output path that is a file, or lies below one, is refused before any work."""
    file = tmp_path / "file"
    file.write_text("x")
    for path in (file, file / "below"):
        with pytest.raises(OutputError):
            check_free(path, overwrite=True)


def test_a_text_file_is_written_by_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When writing fails, the old file is unharmed and no scratch file stays."""
    path = tmp_path / "file"
    write_text(path, "old")

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OutputError, match="cannot write"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_written_file_can_be_read_by_others(tmp_path: Path) -> None:
    """A result is no secret of the user who made it."""
    write_text(tmp_path / "a.txt", "a")
    assert (tmp_path / "a.txt").stat().st_mode & 0o777 == 0o644
