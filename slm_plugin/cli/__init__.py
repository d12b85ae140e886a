"""The command line: results on standard output, progress and messages on standard error.

This module imports nothing slow, so that the signal handlers are installed early.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from slm_plugin import interruption
from slm_plugin.cli import outcome

__all__ = ["main"]


def main() -> None:
    """Run the command line of this process: one message for a failure, never a traceback."""
    try:
        interruption.install(outcome.interrupted_line)
        _forget_relative_paths()
        code = _run()
        interruption.finish()
        # A library may have swallowed the exception and continued.
        code = code if interruption.received() is None else _interrupted()
    except interruption.Interrupted:
        interruption.finish()
        code = _interrupted()
    sys.exit(code)


def _run() -> int:
    from slm_plugin.cli import streams

    streams.prepare_streams()
    if not _has_working_directory():
        return 2
    from slm_plugin.cli import border, commands

    outcome.await_nothing()
    code = border.border(lambda: commands.app(prog_name="slm-plugin", standalone_mode=False))
    return _printed(code, streams.failure_of(sys.stdout))


def _forget_relative_paths() -> None:
    """Remove relative entries from sys.path, which would import from the working directory."""
    for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep):
        if "PYTHONPATH" in os.environ and not os.path.isabs(entry):  # noqa: PTH117
            folder = os.path.abspath(entry)  # noqa: PTH100
            sys.path[:] = [path for path in sys.path if path not in (entry, folder)]


def _has_working_directory() -> bool:
    """Report a deleted working directory, because PyTorch would end the process silently."""
    try:
        Path.cwd()
    except OSError:
        from slm_plugin.progress import complain

        complain("the working directory was deleted", "change to a folder that exists")
        return False
    return True


def _printed(code: int, failure: str) -> int:
    """The exit code after standard output failed for a reason."""
    from slm_plugin.progress import complain, say

    if failure and outcome.has_folder():
        say(f"warning: the summary could not be printed: {failure}")
    elif failure:
        complain(f"cannot write to standard output: {failure}")
        code = code or 1
    return code


def _interrupted() -> int:
    from slm_plugin.progress import complain, finish_bars

    finish_bars()
    complain(outcome.interrupted_line())
    return interruption.received() or 130
