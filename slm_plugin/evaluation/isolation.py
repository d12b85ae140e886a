"""Import guard: run a third-party package without side effects on the process."""

from __future__ import annotations

import logging
import os
import random
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import Any

from tqdm import tqdm  # type: ignore[import-untyped]

from slm_plugin.lazy import np, torch
from slm_plugin.progress import console


@contextmanager
def isolated(logger: str, level: int) -> Iterator[None]:
    """Isolate a package: redirect its output, and restore global state at the end.

    Standard output is redirected to standard error, the log level is set to ``level``, and progress
    bars appear only on a terminal. Environment variables and the states of all random generators
    are restored.

    Args:
        logger: Name of the package's logger.
        level: Lowest level of messages to show.
    """
    with ExitStack() as stack:
        stack.enter_context(redirect_stdout(sys.stderr))
        stack.callback(_restore_environment, dict(os.environ))
        stack.enter_context(torch.random.fork_rng())
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        log = logging.getLogger(logger)
        stack.callback(log.setLevel, log.level)
        log.setLevel(level)
        if not console.is_terminal:
            stack.callback(setattr, tqdm, "__init__", tqdm.__init__)
            tqdm.__init__ = _without_bar(tqdm.__init__)
        yield


def _restore_environment(before: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(before)


def _without_bar(initialise: Any) -> Any:
    def disabled(bar: Any, *args: Any, **settings: Any) -> None:
        initialise(bar, *args, **{**settings, "disable": True})

    return disabled
