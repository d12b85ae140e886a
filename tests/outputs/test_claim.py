"""Outputs appear whole or not at all, and what a failed run made is not thrown away."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import slm_plugin
from slm_plugin.errors import IncompleteError, OutputError, TargetError, WriteError
from slm_plugin.files import write_text
from slm_plugin.outputs import claim as module
from slm_plugin.outputs.claim import INCOMPLETE, claim
from slm_plugin.outputs.marker import MARKER, contents
from slm_plugin.outputs.scratch import RECORD, Work, names, whole_folder
from tests.outputs.conftest import as_nobody
from tests.outputs.test_scratch import dead_process, leave

REPOSITORY = Path(slm_plugin.__file__).parents[1]


def below(folder: Path) -> list[str]:
    """All files, and empty folders with a slash."""
    return sorted(
        path.relative_to(folder).as_posix() + ("/" if path.is_dir() else "")
        for path in folder.rglob("*")
        if not path.is_dir() or not any(path.iterdir())
    )


def write(folder: Path, *names: str, overwrite: bool = False, content: str = "x") -> None:
    """An output with some files."""
    with claim(folder, "run", overwrite=overwrite) as output:
        for name in names:
            (output.folder / name).parent.mkdir(exist_ok=True)
            (output.folder / name).write_text(content)


def test_a_folder_appears_when_its_block_succeeds(tmp_path: Path) -> None:
    """Inside the block the folder does not exist; afterwards it is complete and marked."""
    target = tmp_path / "a" / "out [1]*"
    with claim(target, "run") as output:
        (output.folder / "file").write_text("x")
        assert not target.exists() and output.named == target
    assert below(target) == [MARKER, "file"]
    assert names(target.parent) == [target.name]


@pytest.mark.parametrize("error", [RuntimeError("boom"), KeyboardInterrupt(), SystemExit(3)])
def test_a_failed_or_interrupted_block_leaves_nothing(tmp_path: Path, error: BaseException) -> None:
    """The error passes on; the folders above that were made for it are gone again."""
    with pytest.raises(type(error)), claim(tmp_path / "a" / "b" / "out", "run") as output:
        (output.folder / ".unfinished").write_text("x")
        raise error
    assert not names(tmp_path)


def test_an_interrupted_block_keeps_nothing(tmp_path: Path) -> None:
    """Whatever was whole already: who interrupts does not want it."""
    write(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt), claim(tmp_path / "out", "run", overwrite=True) as output:
        (output.folder / "plan.json").touch()
        raise KeyboardInterrupt
    assert below(tmp_path) == [f"out/{MARKER}", "out/old"]


def test_a_former_result_is_replaced_only_when_allowed(tmp_path: Path) -> None:
    """Without overwrite it is refused; with it, the old one stays until the new one is whole."""
    target = tmp_path / "out"
    write(target, "old", "sub/old")
    with pytest.raises(OutputError, match="--overwrite"):
        write(target)
    with claim(target, "run", overwrite=True) as output:
        (output.folder / "new").write_text("new")
        assert (target / "old").exists()
    assert below(tmp_path) == [f"out/{MARKER}", "out/new"]


def test_what_is_not_ours_is_never_replaced(tmp_path: Path) -> None:
    """Neither a stranger's folder nor a former result to which a user added a file."""
    target = tmp_path / "out"
    target.mkdir()
    (target / "photo").touch()
    with pytest.raises(OutputError, match="no part of a former result: photo"):
        write(target, "new", overwrite=True)
    (target / "photo").unlink()
    write(target, "sub/old")
    (target / "sub" / "photo").touch()
    with pytest.raises(OutputError, match="former result: sub/photo"):
        write(target, "new", overwrite=True)
    assert below(tmp_path) == [f"out/{MARKER}", "out/sub/old", "out/sub/photo"]


def test_what_comes_to_the_output_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    """The run takes hours; what it made is kept beside, and what came is left alone."""
    target = tmp_path / "out"
    for number, before in enumerate(([], ["old"])):
        if before:
            write(target, *before)
        with (
            pytest.raises(IncompleteError, match=r"is not what it was|photo"),
            claim(target, "run", overwrite=True) as output,
        ):
            (output.folder / "new").touch()
            target.mkdir(exist_ok=True)
            (target / "photo").touch()
        assert (target / "photo").exists()
        kept = tmp_path / ("out.incomplete" if number == 0 else "out.incomplete-2")
        assert below(kept) == [MARKER, INCOMPLETE, "new"]
        (target / "photo").unlink()


def test_a_link_stays_and_its_target_is_replaced(tmp_path: Path) -> None:
    """Scratch and lock stand beside the folder that the link leads to."""
    (tmp_path / "disk").mkdir()
    write(tmp_path / "disk" / "real", "old")
    (tmp_path / "out").symlink_to("disk/real")
    write(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "disk") == ["real"]
    assert below(tmp_path / "disk" / "real") == [MARKER, "new"]


def test_permissions_are_those_of_the_umask(tmp_path: Path) -> None:
    """Neither the privacy of temporary files nor more than the user wants."""
    for umask in (0o022, 0o077, 0o002):
        former = os.umask(umask)
        try:
            with claim(tmp_path / f"{umask}" / "out", "run") as output:
                write_text(output.folder / "sub" / "file.txt", "x")
                (output.folder / "private").touch(mode=0o600)
                with whole_folder(output.folder / "part") as part:
                    (part / "private").touch(mode=0o600)
        finally:
            os.umask(former)
        for path in (tmp_path / f"{umask}" / "out").rglob("*"):
            wanted = 0o777 if path.is_dir() else 0o666
            assert path.stat().st_mode & 0o777 == wanted & ~umask, path
        assert (tmp_path / f"{umask}" / "out").stat().st_mode & 0o777 == 0o777 & ~umask


def test_an_empty_folder_is_no_obstacle(tmp_path: Path) -> None:
    """As is one that was made for the purpose."""
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "new")
    assert below(tmp_path) == [f"out/{MARKER}", "out/new"]


# What fails


def test_a_part_that_fails_keeps_back_no_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What is whole is kept under a name that says it is not all; the old result stays."""
    target = tmp_path / "out"
    write(target, "old")
    with pytest.raises(IncompleteError) as told, claim(target, "run", overwrite=True) as output:
        write_text(output.folder / "plan.json", "{}")
        with output.part("export one"):
            (output.folder / "one").mkdir()
            (output.folder / "one" / "half").touch()
            raise TargetError("no room", hint="buy some")
        with output.part("export two"):
            (output.folder / "two").mkdir()
            (output.folder / "two" / "whole").touch()
        with output.part("the report", whole=True):
            (output.folder / "report.json").touch()
            raise ValueError("no page")
    assert told.value.exit_code == 1
    assert str(told.value).splitlines() == [
        "export one failed: no room (buy some)",
        "the report failed: ValueError: no page",
        f"what is whole lies in {tmp_path}/out.incomplete: INCOMPLETE.txt, plan.json, "
        "report.json, two",
    ]
    kept = tmp_path / "out.incomplete"
    assert told.value.kept == kept
    assert below(kept) == [MARKER, INCOMPLETE, "plan.json", "report.json", "two/whole"]
    assert json.loads((kept / MARKER).read_text())["incomplete"] is True
    text = (kept / INCOMPLETE).read_text()
    assert "export one failed: no room" in text and "Whole: plan.json, report.json, two" in text
    assert below(target) == [MARKER, "old"]
    assert names(tmp_path) == ["out", "out.incomplete"]
    assert "export one failed" in capsys.readouterr().err


def test_work_that_fails_keeps_what_is_whole(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A user's error, too, is a failed run once something was made; a fault of ours stays one."""
    for number, error in enumerate((TargetError("too much"), OSError(errno.ENOSPC, "Full"))):
        with (
            pytest.raises(IncompleteError, match=r"too much|Full") as told,
            claim(tmp_path / f"{number}", "plan") as output,
        ):
            write_text(output.folder / "plan.json", "{}")
            (output.folder / ".half").mkdir()
            raise error
        assert told.value.exit_code == 1 and told.value.__cause__ is error
        assert below(tmp_path / f"{number}.incomplete") == [MARKER, INCOMPLETE, "plan.json"]
    with pytest.raises(ZeroDivisionError), claim(tmp_path / "2", "plan") as output:
        write_text(output.folder / "plan.json", "{}")
        _ = 1 / 0
    assert (tmp_path / "2.incomplete" / "plan.json").exists()
    assert f"{tmp_path}/2.incomplete" in capsys.readouterr().err.replace("\n", "")


def test_where_nothing_is_whole_the_error_is_all(tmp_path: Path) -> None:
    """A user's error stays one; an error of the system names the output."""
    with pytest.raises(TargetError), claim(tmp_path / "out", "run"):
        raise TargetError("too much")
    with (
        pytest.raises(WriteError, match=r"out failed: No space") as told,
        claim(tmp_path / "out", "run"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert told.value.exit_code == 1
    assert not names(tmp_path)


def test_an_incomplete_result_may_be_an_output_itself(tmp_path: Path) -> None:
    """It is marked, so it can be replaced when asked for."""
    with pytest.raises(IncompleteError), claim(tmp_path / "out", "run") as output:
        (output.folder / "a").touch()
        raise TargetError("x")
    write(tmp_path / "out.incomplete", "b", overwrite=True)
    assert below(tmp_path) == [f"out.incomplete/{MARKER}", "out.incomplete/b"]


@pytest.mark.parametrize("name", [INCOMPLETE, MARKER])
def test_a_full_disk_keeps_what_is_whole(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also when there is no room for the note or the marker: the name says it."""

    def full(path: Path, text: str) -> None:
        if path.name == name:
            raise WriteError("no room")
        write_text(path, text)

    monkeypatch.setattr(module, "write_text", full)
    monkeypatch.setattr("slm_plugin.outputs.marker.write_text", full)
    with pytest.raises(IncompleteError), claim(tmp_path / "out", "run") as output:
        (output.folder / "weights").touch()
        raise OSError(errno.ENOSPC, "No space left on device")
    assert (tmp_path / "out.incomplete" / "weights").exists()


@pytest.mark.parametrize("size", [*range(0, 60_000, 4096), 1_000_000])
def test_a_disk_that_is_full_at_any_write_loses_nothing(mount_point: Path, size: int) -> None:
    """A real one: the former result is intact, and what fits is kept or the message says why."""
    write(mount_point / "out", "old", "sub/old")
    (mount_point / "filler").write_bytes(b"x" * (1_000_000 - size))
    before = {p: p.read_bytes() for p in (mount_point / "out").rglob("*") if p.is_file()}
    try:
        with claim(mount_point / "out", "run", overwrite=True) as output:
            write_text(output.folder / "plan.json", "{}" * 1000)
            with output.part("weights"):
                (output.folder / "weights").write_bytes(b"x" * 30_000)
    except OutputError as error:
        assert "No space" in str(error)
        assert {p: p.read_bytes() for p in before} == before
    except IncompleteError as error:
        assert "No space" in str(error)
        assert (error.kept / "plan.json").exists()
        assert {p: p.read_bytes() for p in before} == before
    else:
        assert below(mount_point / "out") == [MARKER, "plan.json", "weights"]
    assert not [p for p in names(mount_point) if p.startswith(".")]


def test_when_the_move_fails_all_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At either rename: the former result is at its place, the new one beside it."""
    rename = Path.rename
    for step in (1, 2):
        folder = tmp_path / f"{step}"
        write(folder / "out", "old")
        count = 0

        def failing(path: Path, target: Any, step: int = step) -> Path:
            nonlocal count
            if Path(target).name in ("replaced", "out"):
                count += 1
                if count == step:
                    raise OSError(errno.EBUSY, "Device or resource busy", str(path))
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", failing)
        with pytest.raises(IncompleteError, match="busy"):
            write(folder / "out", "new", overwrite=True)
        monkeypatch.setattr(Path, "rename", rename)
        assert below(folder / "out") == [MARKER, "old"]
        assert below(folder / "out.incomplete") == [MARKER, INCOMPLETE, "new"]
        assert names(folder) == ["out", "out.incomplete"]


def test_what_cannot_be_moved_at_all_stays_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message says where, and no later start deletes it."""
    rename = Path.rename

    def failing(path: Path, target: Any) -> Path:
        if path.name == "result":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(IncompleteError, match="what is whole lies in") as told:
        write(tmp_path / "out", "new")
    monkeypatch.setattr(Path, "rename", rename)
    write(tmp_path / "out", "later")
    assert (told.value.kept / "new").exists()


@pytest.mark.parametrize("step", [1, 2])
def test_an_interrupt_between_the_renames_puts_all_back(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the second as well: who interrupts is told that nothing was written."""
    rename = Path.rename
    count = 0

    def interrupted(path: Path, target: Any) -> Path:
        nonlocal count
        moved = rename(path, target)
        if Path(target).name in ("replaced", "out"):
            count += 1
            if count == step:
                raise KeyboardInterrupt
        return moved

    write(tmp_path / "out", "old")
    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "out", "new", overwrite=True)
    assert below(tmp_path) == [f"out/{MARKER}", "out/old"]


# What dies


def die(folder: Path, step: int) -> None:
    """Write an output with the files new and sub/new in a process that dies at a rename."""
    code = (
        "import runpy, sys; from pathlib import Path\n"
        f"runpy.run_path({str(REPOSITORY / 'benchmarks' / 'dying.py')!r})['die_at']({step})\n"
        "from slm_plugin.outputs.claim import claim\n"
        f"with claim(Path({str(folder)!r}), 'run', overwrite=True) as output:\n"
        "    (output.folder / 'sub').mkdir()\n"
        "    (output.folder / 'sub' / 'new').write_text('new')\n"
        "    (output.folder / 'new').write_text('new')\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL


OLD, NEW = [MARKER, "old", "sub/old"], [MARKER, "new", "sub/new"]


@pytest.mark.parametrize(("step", "found"), [(1, OLD), (2, OLD), (3, NEW)])
def test_a_death_between_the_renames_is_put_right_at_the_next_start(
    tmp_path: Path, step: int, found: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The former result is at its place again, though the next run fails, and the user is told."""
    target = tmp_path / "out"
    write(target, "old", "sub/old")
    die(target, step)
    assert target.exists() == (step != 2)
    with pytest.raises(OutputError, match="--overwrite"):
        write(target, "newer")
    assert below(target) == found
    assert names(tmp_path) == ["out"]
    said = " ".join(capsys.readouterr().err.split())
    assert ("it is back at" in said) == (step == 2)
    write(target, "newer", overwrite=True)
    assert below(tmp_path) == [f"out/{MARKER}", "out/newer"]


def test_a_first_result_that_died_before_its_rename_is_cleared_away(tmp_path: Path) -> None:
    """Nothing looks finished that is not."""
    die(tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()
    write(tmp_path / "out", "new")
    assert below(tmp_path) == [f"out/{MARKER}", "out/new"]


@pytest.mark.parametrize("step", range(1, 9))
def test_a_death_while_a_folder_is_filled_in_place_is_put_right(
    mount_point: Path, step: int
) -> None:
    """Entry by entry, at each of them: the former result is there again, or the new one is."""
    write(mount_point, "old", "sub/old")
    (mount_point / "lost+found").mkdir()
    die(mount_point, step)
    with pytest.raises(OutputError, match="--overwrite"):
        write(mount_point, "newer")
    # Three former entries, their step, three new ones: then it is done.
    assert below(mount_point) == sorted([*(OLD if step < 8 else NEW), "lost+found/"])


def test_a_folder_is_filled_and_replaced_in_place(mount_point: Path) -> None:
    """A mount point stays one; nothing is left in it or beside it."""
    inode = mount_point.stat().st_ino
    write(mount_point, "old", "sub/old")
    assert below(mount_point) == [MARKER, "old", "sub/old"]
    with pytest.raises(OutputError, match="--overwrite"):
        write(mount_point, "new")
    write(mount_point, "new", "sub/new", overwrite=True)
    assert below(mount_point) == [MARKER, "new", "sub/new"]
    with (
        pytest.raises(IncompleteError) as told,
        claim(mount_point, "run", overwrite=True) as output,
    ):
        (output.folder / "newer").touch()
        raise TargetError("x")
    assert told.value.kept == mount_point / "slm-plugin.incomplete"
    assert {"new", "slm-plugin.incomplete"} <= set(names(mount_point))
    with pytest.raises(OutputError, match=r"former result: slm-plugin\.incomplete"):
        write(mount_point, "newer", overwrite=True)
    assert mount_point.stat().st_ino == inode
    assert names(mount_point.parent) == ["disk"]


def test_a_full_disk_in_place_puts_all_back(
    mount_point: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each rename that fails."""
    write(mount_point, "old", "sub/old")
    rename = Path.rename
    for step in range(1, 8):
        count = 0

        def failing(path: Path, target: Any, step: int = step) -> Path:
            nonlocal count
            count += 1
            if count == step:
                raise OSError(errno.ENOSPC, "No space left on device")
            return rename(path, target)

        monkeypatch.setattr(Path, "rename", failing)
        with (
            pytest.raises(IncompleteError, match="No space") as told,
            claim(mount_point, "run", overwrite=True) as output,
        ):
            (output.folder / "old").write_text("new")
            (output.folder / "new").write_text("new")
            count = 0
        monkeypatch.setattr(Path, "rename", rename)
        assert (mount_point / "old").read_text() == "x"
        assert {MARKER, "old", "sub"} < set(names(mount_point)), step
        for path in sorted(told.value.kept.rglob("*"), reverse=True):
            path.unlink()
        told.value.kept.rmdir()
        assert below(mount_point) == [MARKER, "old", "sub/old"], step


def test_scratch_that_only_looks_like_ours_is_left_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A stranger's folder, file or link, that of another output, and that of a living process."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "file").touch()
    ours = leave(tmp_path / ".out.partial-1", {**dead_process(), "folder": "out"})
    (ours / "result" / "link").symlink_to(tmp_path / "far")
    strangers = [
        leave(tmp_path / ".out.partial-2", None),
        leave(tmp_path / ".out.partial-3", {**dead_process(), "folder": "other"}),
        leave(tmp_path / ".out.partial-999999-abc", {"tool": "x", "pid": 1}),
    ]
    elsewhere = {**dead_process(), "folder": "out", "host": "another", "boot": "another"}
    strangers.append(leave(tmp_path / ".out.partial-4", elsewhere))
    (tmp_path / ".out.partial-5").symlink_to(tmp_path / "far")
    (tmp_path / ".out.partial-6").touch()
    (tmp_path / ".out.replaced-7").mkdir()
    write(tmp_path / "out", "new")
    assert not ours.exists()
    for path in strangers:
        assert (path / "result" / "weights").exists(), path
    assert (tmp_path / "far" / "file").exists()
    assert {".out.partial-5", ".out.partial-6", ".out.replaced-7"} < set(names(tmp_path))
    assert "another machine may still be writing" in " ".join(capsys.readouterr().err.split())


def test_a_former_result_whose_place_is_taken_is_kept_beside_it(tmp_path: Path) -> None:
    """Someone made a folder of that name after the death."""
    target = tmp_path / "out"
    write(target, "old", "sub/old")
    die(target, 2)
    target.mkdir()
    (target / "photo").touch()
    with pytest.raises(OutputError, match="photo"):
        write(target, "new", overwrite=True)
    (target / "photo").rename(tmp_path / "photo")
    (target / "other").touch()
    work = next(path for path in tmp_path.iterdir() if path.name.startswith(".out.partial-"))
    assert below(Work(work).replaced) == OLD and (work / RECORD).exists()
    (target / "other").unlink()
    target.rmdir()
    target.mkdir()
    with pytest.raises(OutputError, match="--overwrite"):
        write(target, "new")
    assert below(target) == OLD


def test_a_folder_that_nobody_may_write_beside_is_filled_in_place(tmp_path: Path) -> None:
    """As a service's data folder is, which root made for it."""
    for above in (tmp_path, *tmp_path.parents[:-2]):
        above.chmod(0o755)
    folder = tmp_path / "data"
    folder.mkdir()
    folder.chmod(0o777)

    def run_twice() -> str:
        write(folder, "old")
        write(folder, "new", overwrite=True)
        return ",".join(below(folder))

    assert as_nobody(run_twice) == f"{MARKER},new"
    (tmp_path / "closed").mkdir()
    for path in (tmp_path / "closed" / "out", tmp_path / "closed", tmp_path / "closed" / "a" / "b"):
        said = as_nobody(lambda path=path: str(write(path, "x")))  # type: ignore[misc]
        assert said.startswith("OutputError: cannot write into"), said
    assert not contents(tmp_path).known


def test_a_former_result_that_cannot_be_put_back_is_put_back_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When the disk fails in the middle of it: nothing is deleted, and the message says where."""
    write(tmp_path / "out", "old")
    rename = Path.rename

    def failing(path: Path, target: Any) -> Path:
        if Path(target).name == "out":
            raise OSError(errno.EIO, "Input/output error")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(IncompleteError, match="former result lies in") as told:
        write(tmp_path / "out", "new", overwrite=True)
    assert (told.value.kept / "new").exists() and not (tmp_path / "out").exists()
    with pytest.raises(OutputError, match="cannot put back"):
        write(tmp_path / "out", "newer", overwrite=True)
    monkeypatch.setattr(Path, "rename", rename)
    # The process that failed has ended by now.
    record = told.value.kept.parent / RECORD
    record.write_text(json.dumps({**dead_process(), "folder": "out"}))
    with whole_folder(tmp_path / "out"):
        assert (told.value.kept / "new").exists()
        (tmp_path / "out").mkdir()
    with pytest.raises(OutputError, match="--overwrite"):
        write(tmp_path / "out", "newer")
    assert below(tmp_path) == [f"out/{MARKER}", "out/old"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_file_that_comes_to_the_output_meanwhile_stays(tmp_path: Path, overwrite: bool) -> None:
    """Where nothing was, or a former result, nothing else is ever moved away."""
    target = tmp_path / "out"
    if overwrite:
        write(target, "old")
    with (
        pytest.raises(IncompleteError, match="is not what it was"),
        claim(target, "run", overwrite=overwrite) as output,
    ):
        (output.folder / "new").touch()
        shutil.rmtree(target, ignore_errors=True)
        target.write_text("precious")
    assert target.read_text() == "precious"
    assert (tmp_path / "out.incomplete" / "new").exists()


def test_a_private_folder_stays_private(tmp_path: Path) -> None:
    """The new folder takes over the permissions of the one that it replaces."""
    target = tmp_path / "out"
    target.mkdir(mode=0o700)
    write(target, "new")
    assert target.stat().st_mode & 0o777 == 0o700
