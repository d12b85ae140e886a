"""The command line: results on standard output, progress and messages on standard error."""

from __future__ import annotations

import os
import sys

import typer

from slm_plugin.cli import computing, telling
from slm_plugin.cli.app import app
from slm_plugin.errors import SlmError
from slm_plugin.progress import console

__all__ = ["app", "computing", "main", "telling"]


def main() -> None:
    """Run the command line; a known error is one message, never a traceback."""
    try:
        code = app(standalone_mode=False)
    except SlmError as error:
        _complain(error.message, error.hint)
        code = error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted; nothing was written")
        code = 130
    except Exception as error:
        code = _out_of_memory() if _is_out_of_memory(error) else _unexpected(error)
    sys.exit(code if isinstance(code, int) else 0)


def _complain(message: str, hint: str = "") -> None:
    for line in message.splitlines():
        console.print(f"error: {line}", style="red", markup=False, soft_wrap=True)
    if hint:
        console.print(f"hint: {hint}", markup=False, soft_wrap=True)


def _is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out: PyTorch has a class for that on a GPU, and only words on a CPU."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or "allocate memory" in str(error)


def _out_of_memory() -> int:
    _complain(
        "out of memory; nothing was written",
        "use `memory: layerwise`, bfloat16, or fewer or shorter calibration samples",
    )
    return 1


def _unexpected(error: Exception) -> int:
    """Show usage errors as they are; anything else is a fault of ours and says how to see it."""
    # Typer carries a click of its own, whose usage errors it does not export.
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, typer.Abort):
        _complain("interrupted; nothing was written")
        return 130
    show, code = getattr(error, "show", None), getattr(error, "exit_code", None)
    if callable(show) and isinstance(code, int):
        show()
        return code
    if os.environ.get("SLM_PLUGIN_TRACEBACK"):
        raise error
    reason = (str(error).strip().splitlines() or [""])[0]
    _complain(
        f"internal error: {type(error).__name__}: {reason}",
        "SLM_PLUGIN_TRACEBACK=1 shows where; please report it",
    )
    return 1
