"""A run that is asked to end ends soon, says so, and leaves nothing behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.interrupted import PROMISE, Left, interrupt_after, interrupt_at, prepare

pytestmark = pytest.mark.skipif(os.name == "nt", reason="signals of Unix")

MOMENTS = {
    "while typer is imported": """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "typer": now()
sys.meta_path.insert(0, Finder())
""",
    "while torch is imported": """
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torch.nn": now()
sys.meta_path.insert(0, Finder())
""",
    "while a stage plans": """
import slm_plugin.pipeline as p
p._stage = lambda *_: now()
""",
    "while the reload child runs": """
import subprocess, threading
def soon(*a, _communicate=subprocess.Popen.communicate, **k):
    threading.Timer(0.5, now).start()
    return _communicate(*a, **k)
subprocess.Popen.communicate = soon
""",
    "as soon as there is a scratch folder": """
import slm_plugin.outputs.claim as c
def made(*a, _make=c.make_work, **k):
    work = _make(*a, **k); now(); return work
c.make_work = made
""",
    "a second time during the clean-up": """
import shutil, slm_plugin.pipeline as p
p._stage = lambda *_: now()
def removing(*a, _remove=shutil.rmtree, **k):
    now(); now(signal.SIGINT); return _remove(*a, **k)
shutil.rmtree = removing
""",
}


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny run; nothing of it is changed by a run that is interrupted."""
    return prepare(tmp_path_factory.mktemp("interrupted"))


def as_promised(left: Left, signum: int) -> None:
    """The code, the line, and nothing else."""
    assert "Traceback" not in left.error and "Exception ignored" not in left.error, left.error
    assert left.error.endswith(PROMISE), left.error
    assert (left.code, left.files, left.processes) == (128 + signum, (), ())


@pytest.mark.process
@pytest.mark.parametrize("number", range(len(MOMENTS)), ids=list(MOMENTS))
def test_a_run_may_be_interrupted_at_any_moment(recipe: Path, number: int) -> None:
    """130 for Ctrl-C, 143 for SIGTERM; no trace, no child, no scratch."""
    signum = (signal.SIGINT, signal.SIGTERM)[number % 2]
    as_promised(interrupt_at(recipe, signum, list(MOMENTS.values())[number]), signum)


@pytest.mark.process
@pytest.mark.parametrize(
    ("signum", "seconds"), [(signal.SIGINT, 0.5), (signal.SIGTERM, 1.0), (signal.SIGHUP, 3.0)]
)
def test_a_signal_from_outside_does_the_same(recipe: Path, signum: int, seconds: float) -> None:
    """Sent twice in a row: the second changes nothing."""
    as_promised(interrupt_after(recipe, signum, seconds, again=True), signum)


SMALL = """
import os, signal, sys, time
from slm_plugin import cli
def work():
    {work}
cli._run = work
cli.main()
"""


def small(work: str, shell: str = '"$@"') -> subprocess.CompletedProcess[str]:
    """Carry out a command that is a few lines of code, with all handlers around it."""
    code = SMALL.format(work=work.replace("\n", "\n    "))
    return subprocess.run(
        ["sh", "-c", shell, "sh", sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=False,
    )


LOST = {
    "swallowed by a library": """\
try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(1)
except BaseException: pass
time.sleep(30)""",
    "in a finaliser": """\
class Dying:
    def __del__(self): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1)
Dying(); time.sleep(30)""",
    "in a callback that cannot pass it on": """\
import ctypes
def called(): os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1)
ctypes.CFUNCTYPE(None)(called)(); time.sleep(30)""",
    "swallowed until the very end": """\
try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(1)
except BaseException: return 0""",
    "turned into an ordinary error": """\
from slm_plugin.cli.border import border
def turned():
    try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(1)
    except BaseException as error: raise ImportError("failed to import") from error
return border(turned)""",
    "taken for the end of the process": """\
from slm_plugin.cli.border import border
def ended():
    try: os.kill(os.getpid(), signal.SIGTERM); time.sleep(1)
    finally: sys.exit(0)
return border(ended)""",
}


@pytest.mark.parametrize("work", LOST.values(), ids=list(LOST))
def test_an_interruption_does_not_get_lost(work: str) -> None:
    """Whatever code it meets, the command ends with the code and the line."""
    done = small(work)
    assert (done.returncode, done.stdout, done.stderr) == (143, "", PROMISE)


@pytest.mark.parametrize("ignored", ["INT", "TERM", "HUP"])
def test_what_the_parent_ignores_stays_ignored(ignored: str) -> None:
    """`nohup` and a script's `&` mean it."""
    work = f"os.kill(os.getpid(), signal.SIG{ignored}); time.sleep(0.05); return 7"
    assert small(work, f"trap '' {ignored}; \"$@\"").returncode == 7
    assert small(work).returncode == 128 + getattr(signal, f"SIG{ignored}")


def test_a_forked_worker_ends_without_a_word() -> None:
    """It inherits the handlers, and its parent ends it by a signal."""
    work = (
        "child = os.fork()\n"
        "if child == 0: time.sleep(30)\n"
        "time.sleep(0.2); os.kill(child, signal.SIGTERM)\n"
        "return os.WTERMSIG(os.waitpid(child, 0)[1])"
    )
    done = small(work)
    assert (done.returncode, done.stderr) == (signal.SIGTERM, "")


def test_a_child_is_known_before_the_interruption() -> None:
    """A signal between the start of a process and the wait for it leaves no process alone."""
    work = (
        "import subprocess\n"
        "class Started(subprocess.Popen):\n"
        "    def __init__(self, *a, **k):\n"
        "        super().__init__(*a, **k); print(self.pid, flush=True)\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
        "Started.__init__.__globals__['__name__'] = 'subprocess'\n"
        "subprocess.Popen = Started; subprocess.run(['sleep', '30'], stdin=subprocess.PIPE)"
    )
    done = small(work)
    assert (done.returncode, done.stderr) == (143, PROMISE)
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)


def test_a_signal_after_the_result_does_not_deny_it(tmp_path: Path) -> None:
    """The line says what is true: the folder is there."""
    work = (
        "from pathlib import Path\n"
        "from slm_plugin.cli.outcome import await_folder\n"
        f"folder = Path({str(tmp_path / 'out')!r}); await_folder(folder); folder.mkdir()\n"
        "os.kill(os.getpid(), signal.SIGINT); time.sleep(1)"
    )
    done = small(work)
    assert done.returncode == 130
    assert done.stderr.endswith("out was written before and is complete\n")
