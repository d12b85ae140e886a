"""Run a command of slm-plugin and kill it in the moments in which its output takes its place.

    python benchmarks/dying.py 2 run recipe.yaml --overwrite

kills the process (SIGKILL, as when memory runs out) before the second rename of that moment. Where
a folder is replaced there are four: the former result goes out of the way, the new one comes, the
former one is given up; and the end. A command that gets by with fewer ends as usual. `die_at` does
the same for a script of one's own.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from slm_plugin.outputs import claim, replacing


def die_at(step: int) -> None:
    """Kill this process before the rename of that number (from 1) once an output is whole."""
    rename, take_place = Path.rename, replacing.take_place
    count = 0

    def dying(path: Path, target: Any) -> Path:
        nonlocal count
        count += 1
        if count == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    def armed(work: Any, place: Any) -> None:
        Path.rename = dying  # type: ignore[assignment,method-assign]
        take_place(work, place)

    claim.take_place = armed  # type: ignore[attr-defined]


if __name__ == "__main__":
    from slm_plugin.cli import main

    die_at(int(sys.argv[1]))
    sys.argv = ["slm-plugin", *sys.argv[2:]]
    main()
