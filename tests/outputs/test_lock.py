"""One writer for an output; the lock dies with its process and leaves nothing behind."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from slm_plugin.errors import OutputError
from slm_plugin.outputs import lock
from slm_plugin.outputs.claim import claim
from slm_plugin.outputs.lock import locked
from tests.outputs.conftest import as_nobody, script

HOLD = "with claim(Path(sys.argv[1]), 'run'):\n    print('held', flush=True); sys.stdin.read()\n"


def held(path: Path) -> subprocess.Popen[str]:
    """A process that holds an output until its standard input ends."""
    process = script(HOLD, path)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_the_second_process_is_refused_at_once_by_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: Callable[[Path], Path]
) -> None:
    """Through a link, relative, with dots, through another mount: it is the same folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to(tmp_path)
    first = held(tmp_path / "out")
    started = time.monotonic()
    mounted = bound(tmp_path) / "out"
    for path in ("out", "link/out", "x/../out", "./out/", mounted):
        with pytest.raises(OutputError, match=f"process {first.pid} on") as told:
            claim(Path(path), "run").__enter__()
        assert "wait" in told.value.hint
    assert time.monotonic() - started < 5
    first.communicate()
    assert first.returncode == 0 and (tmp_path / "out").is_dir()


def test_an_existing_folder_that_is_mounted_elsewhere_is_locked_itself(
    tmp_path: Path, bound: Callable[[Path], Path]
) -> None:
    """As a container sees a folder of the host: beside it is nothing in common."""
    (tmp_path / "out").mkdir()
    inside = bound(tmp_path / "out")
    first = held(tmp_path / "out")
    with pytest.raises(OutputError, match="is being written"), claim(inside, "run"):
        pass
    first.communicate()
    assert first.returncode == 0


def test_one_process_does_not_get_a_lock_twice(tmp_path: Path) -> None:
    """Nor do two threads of it."""
    again = claim(tmp_path / "out", "run")
    with (
        claim(tmp_path / "out", "run"),
        pytest.raises(OutputError, match=f"process {os.getpid()}"),
    ):
        again.__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    """Killed, with a forked child that lives on: the next one finds it free."""
    code = (
        "import os, time\n"
        "with claim(Path(sys.argv[1]), 'run'):\n"
        "    if os.fork() == 0:\n"
        "        print(os.getpid(), flush=True); os.close(1); os.close(2); time.sleep(60)\n"
        "    time.sleep(60)\n"
    )
    process = script(code, tmp_path / "out")
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.kill()
    process.wait()
    os.kill(child, 0)
    with claim(tmp_path / "out", "run"):
        pass
    os.kill(child, signal.SIGKILL)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_lock_file_of_a_dead_process_never_blocks(tmp_path: Path) -> None:
    """One of another user, which may only be read, neither; a stranger's stays as it was."""
    file = tmp_path / ".out.slm-plugin.lock"
    for content in ("", "{", '{"tool": "slm-plugin", "pid": 1, "host": "x"}'):
        file.write_text(content)
        with locked(file, tmp_path / "out", tmp_path / "out") as works:
            assert works
        assert file.exists() == (content == "{")
    file.write_text("a stranger's")
    with claim(tmp_path / "out", "run"):
        pass
    assert file.read_text() == "a stranger's"


def test_a_lock_file_of_another_user_is_locked_all_the_same(tmp_path: Path) -> None:
    """It may be read, and that is enough."""
    for above in (tmp_path, *tmp_path.parents[:-2]):
        above.chmod(0o755)
    shared = tmp_path / "shared"
    shared.mkdir()
    shared.chmod(0o777)
    file = shared / "lock"
    file.touch(mode=0o644)

    def try_it() -> str:
        with locked(file, shared / "out", shared / "out") as works:
            return str(works)

    assert as_nobody(try_it) == "True"
    with locked(file, shared / "out", shared / "out"):
        assert as_nobody(try_it).startswith("OutputError")


@pytest.mark.parametrize("kind", ["folder", "pipe", "link", "dangling"])
def test_what_is_no_file_is_in_the_way(tmp_path: Path, kind: str) -> None:
    """A link is not followed."""
    file = tmp_path / ".out.slm-plugin.lock"
    if kind == "folder":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to(tmp_path / kind)
        if kind == "link":
            (tmp_path / kind).touch()
    with pytest.raises(OutputError), claim(tmp_path / "out", "run"):
        pass
    assert os.path.lexists(file) and not (tmp_path / "dangling").exists()


def test_a_disk_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run goes on; who starts a second one has been warned."""

    def no_locks(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    with claim(tmp_path / "out", "run"):
        pass
    assert "has no locks" in capsys.readouterr().err
    assert not lock._held


@pytest.mark.process
def test_a_name_is_held_by_one_however_they_race(tmp_path: Path) -> None:
    """Takers that come and go: never two at a time, though the file is deleted between them."""
    code = (
        "import os, time\n"
        "from slm_plugin.outputs.lock import locked\n"
        "from slm_plugin.errors import OutputError\n"
        "folder = Path(sys.argv[1]); got = 0; end = time.monotonic() + 1.5\n"
        "print('ready', flush=True); sys.stdin.readline()\n"
        "while time.monotonic() < end:\n"
        "    try:\n"
        "        with locked(folder / 'lock', folder / 'out', folder):\n"
        "            os.close(os.open(folder / 'only', os.O_CREAT | os.O_EXCL))\n"
        "            got += 1\n"
        "            os.unlink(folder / 'only')\n"
        "    except OutputError:\n"
        "        pass\n"
        "print(got)\n"
    )
    takers = [script(code, tmp_path) for _ in range(3)]
    for taker in takers:
        assert taker.stdout is not None and taker.stdout.readline() == "ready\n"
    said = []
    for taker in takers:
        assert taker.stdin is not None
        taker.stdin.write("\n")
        taker.stdin.flush()
    for taker in takers:
        out, err = taker.communicate()
        assert taker.returncode == 0, err
        said.append(int(out))
    assert sum(said) > 50
    assert not list(tmp_path.iterdir())


def test_of_two_that_start_together_one_writes(tmp_path: Path) -> None:
    """Twenty times: one result, one refusal that names the folder, nothing else left."""
    code = (
        "import time\n"
        "from slm_plugin.errors import OutputError\n"
        "for number in range(20):\n"
        "    print('ready', flush=True); sys.stdin.readline()\n"
        "    try:\n"
        "        with claim(Path(sys.argv[1]) / str(number) / 'deep' / 'out', 'run') as output:\n"
        "            (output.folder / sys.argv[2]).touch(); time.sleep(0.1)\n"
        "        print('wrote', flush=True)\n"
        "    except OutputError as error:\n"
        "        print(f'refused {error}', flush=True)\n"
    )
    both = [script(code, tmp_path, name) for name in "ab"]
    for number in range(20):
        for one in both:
            assert one.stdout is not None and one.stdout.readline() == "ready\n"
        for one in both:
            assert one.stdin is not None
            one.stdin.write("\n")
            one.stdin.flush()
        said = [one.stdout.readline() for one in both if one.stdout]
        assert sorted(line.split()[0] for line in said) == ["refused", "wrote"], said
        assert any(str(tmp_path / str(number) / "deep" / "out") in line for line in said)
        (winner,) = [name for name, line in zip("ab", said, strict=True) if "wrote" in line]
        folder = tmp_path / str(number) / "deep"
        assert [path.name for path in folder.iterdir()] == ["out"]
        assert (folder / "out" / winner).exists() and len(list((folder / "out").iterdir())) == 2
    for one in both:
        one.communicate()
