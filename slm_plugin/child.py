"""Python programs in processes of their own, which import nothing from the working directory."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
# Python 3.10 has no -P, and -I would lose the packages that PYTHONPATH and the user's own
# site-packages hold. The package itself is loaded from where this process has it, so that no
# folder of that name can take its place.
_START = """\
import sys
sys.path[:] = [entry for entry in sys.path if entry]
import importlib.util
import runpy
package, name, *arguments = sys.argv[1:]
if name.partition(".")[0] == "slm_plugin":
    spec = importlib.util.spec_from_file_location(
        "slm_plugin", package + "/__init__.py", submodule_search_locations=[package]
    )
    sys.modules["slm_plugin"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["slm_plugin"])
sys.argv = [name, *arguments]
runpy.run_module(name, run_name="__main__", alter_sys=True)
"""


def run_module(
    module: str,
    *arguments: str,
    python: str = sys.executable,
    variables: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a module as ``python -m`` does, whatever files lie in the working directory.

    The process works in the root folder, so paths in the arguments have to be absolute. Of
    PYTHONPATH it sees the absolute entries alone.

    Args:
        module: Name of the module, of this package or of another one that is installed.
        arguments: What the module finds in ``sys.argv``.
        python: The interpreter; a name without a folder is looked up in PATH.
        variables: Environment variables to add.

    Raises:
        OSError: The interpreter cannot be started.
    """
    found = shutil.which(python, path=_absolute(os.environ.get("PATH", os.defpath)))
    command = [str(Path(found or python).absolute()), "-c", _START, str(PACKAGE), module]
    return subprocess.run(
        [*command, *arguments],
        env={**environment(), **(variables or {})},
        cwd=Path(sys.base_prefix).absolute().anchor,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )


def environment() -> dict[str, str]:
    """This process's environment, without what makes Python look into the working directory."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # Programs that the child starts in turn keep out of their working directory, too (3.11).
    kept["PYTHONSAFEPATH"] = "1"
    entries = _absolute(os.environ.get("PYTHONPATH", ""))
    return {**kept, "PYTHONPATH": entries} if entries else kept


def _absolute(path: str) -> str:
    """The absolute entries of a search path."""
    return os.pathsep.join(e for e in path.split(os.pathsep) if Path(e).is_absolute())
