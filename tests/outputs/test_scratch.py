"""Scratch folders say whose they are; only what is surely ours and surely dead is deleted."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from slm_plugin.errors import OutputError, WriteError
from slm_plugin.outputs import owner, scratch
from slm_plugin.outputs.owner import RECORD, read_record, surely_dead, this_process
from slm_plugin.outputs.scratch import TEMPORARY, sweep_temporary, temporary_folder, whole_folder


def dead_process() -> dict[str, Any]:
    """The record of a process that has ended."""
    code = "import json\nfrom slm_plugin.outputs.owner import this_process\n"
    code += "print(json.dumps(this_process('')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def leave(folder: Path, record: dict[str, Any] | None) -> Path:
    """A scratch folder as a killed process leaves it."""
    (folder / "result").mkdir(parents=True)
    (folder / "result" / "weights").write_text("x")
    if record is not None:
        (folder / RECORD).write_text(json.dumps(record))
    return folder


def test_a_process_is_dead_only_where_that_is_sure() -> None:
    """Its id may be in use again, and on other machines ids say nothing."""
    alive, ended = this_process(""), dead_process()
    assert not surely_dead(alive)
    assert surely_dead(ended)
    assert surely_dead({**alive, "started": alive["started"] - 1})
    assert not surely_dead({**ended, "boot": "another", "host": "another"})
    assert not surely_dead({**ended, "boot": "another"} | {"machine": "another"})
    assert not surely_dead({**ended, "ids": "pid:[1]"})
    # A container that has gone had the same kernel: whoever holds the lock knows.
    assert surely_dead({**ended, "ids": "pid:[1]", "host": "another"}, locked=True)
    assert not surely_dead({**ended, "boot": "another", "host": "another"}, locked=True)
    if alive["machine"]:
        assert surely_dead({**alive, "boot": "an earlier one"})
    assert surely_dead({**ended, "pid": 2**70})


def test_a_zombie_is_dead() -> None:
    """It holds nothing any more, though its id is still in use."""
    child = subprocess.Popen(
        [sys.executable, "-c", "from slm_plugin.outputs.owner import *; import json\n"
         "print(json.dumps(this_process('')), flush=True)"],
        stdout=subprocess.PIPE,
    )  # fmt: skip
    assert child.stdout is not None
    record = json.loads(child.stdout.readline())
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    os.kill(child.pid, 0)
    assert surely_dead(record)
    child.wait()
    child.stdout.close()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"tool": "other", "pid": 1}', '{"tool": "slm-plugin"}', "[" * 9999,
             '{"tool": "slm-plugin", "pid": "1"}', '{"tool": "slm-plugin", "pid": true}'],
)  # fmt: skip
def test_a_damaged_record_is_nobodys(tmp_path: Path, text: str) -> None:
    """What says nothing certain is left alone."""
    (tmp_path / "record").write_text(text)
    assert read_record(tmp_path / "record") is None


def test_without_a_system_that_tells_nothing_is_sure(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without /proc: a process id in use may be anybody's."""
    ended = dead_process()
    monkeypatch.setattr(owner, "_read", lambda _: "")
    alive = this_process("")
    assert not surely_dead(alive)
    assert surely_dead({**alive, "pid": ended["pid"]})
    assert not surely_dead({**alive, "pid": ended["pid"], "host": "another"})


def test_only_our_dead_leftovers_are_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A living process keeps its own; a stranger's file, folder or link is left alone."""
    monkeypatch.setattr(scratch.tempfile, "gettempdir", lambda: str(tmp_path))
    ours = leave(tmp_path / f"{TEMPORARY}dead", dead_process())
    (tmp_path / "precious").mkdir()
    (ours / "result" / "link").symlink_to(tmp_path / "precious")
    (tmp_path / "precious" / "file").touch()
    others = [
        leave(tmp_path / f"{TEMPORARY}alive", this_process("")),
        leave(tmp_path / f"{TEMPORARY}stranger", None),
        leave(tmp_path / f"{TEMPORARY}output", {**dead_process(), "folder": "out"}),
        leave(tmp_path / "unrelated", dead_process()),
    ]
    (tmp_path / f"{TEMPORARY}file").touch()
    (tmp_path / f"{TEMPORARY}link").symlink_to(leave(tmp_path / "far", dead_process()))
    sweep_temporary()
    assert not ours.exists()
    for path in (*others, tmp_path / "far", tmp_path / "precious"):
        assert any(path.iterdir()), path
    assert (tmp_path / f"{TEMPORARY}file").exists() and (tmp_path / f"{TEMPORARY}link").exists()


def test_another_users_leftovers_are_left_alone(tmp_path: Path) -> None:
    """In a folder of all users anybody may make a folder that looks like ours."""
    left = leave(tmp_path / f"{TEMPORARY}dead", dead_process())
    try:
        os.chown(left, 65534, 65534)
    except PermissionError:
        pytest.skip("only root can give a folder away")
    with temporary_folder(tmp_path):
        assert left.exists()


def test_a_temporary_folder_is_private_and_goes(tmp_path: Path) -> None:
    """Whatever happens in its block."""
    with pytest.raises(RuntimeError), temporary_folder(tmp_path) as folder:
        assert folder.parent.stat().st_mode & 0o077 == 0
        (folder / "file").touch()
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with pytest.raises(OutputError, match="TMPDIR"), temporary_folder(tmp_path / "nowhere"):
        pass


def test_a_part_appears_when_its_block_succeeds(tmp_path: Path) -> None:
    """Inside the block the folder does not exist; afterwards it is complete."""
    target = tmp_path / "a" / "out[1]"
    with whole_folder(target) as folder:
        (folder / "file").write_text("x")
        assert not target.exists()
    assert (target / "file").read_text() == "x"
    assert [p.name for p in target.parent.iterdir()] == ["out[1]"]
    with pytest.raises(OutputError, match="exists"), whole_folder(target):
        pass


def test_a_part_that_fails_leaves_nothing(tmp_path: Path) -> None:
    """An error passes on; one of the system becomes one that names the folder."""
    with pytest.raises(RuntimeError, match="boom"), whole_folder(tmp_path / "out") as folder:
        (folder / "file").write_text("x")
        raise RuntimeError("boom")
    with pytest.raises(WriteError, match="No space left"), whole_folder(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_what_a_killed_process_left_of_a_part_goes_with_the_next(tmp_path: Path) -> None:
    """That of a living one, or of another part, stays."""
    names = ["out[1]", "out[1]", "other"]
    records = [dead_process(), this_process(""), dead_process()]
    left = [
        leave(tmp_path / f".{name}.partial-{number}", {**record, "folder": name})
        for number, (name, record) in enumerate(zip(names, records, strict=True))
    ]
    with whole_folder(tmp_path / "out[1]"):
        assert [path.exists() for path in left] == [False, True, True]
