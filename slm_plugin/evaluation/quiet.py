"""Running somebody else's package so that it leaves no trace behind."""

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
def guest(logger: str, level: int) -> Iterator[None]:
    """Keep standard output clean, and restore what a package sets globally.

    What it prints goes to standard error, its log is held to ``level``, its progress bars show on
    a terminal only. Environment variables and the states of all random generators are restored.

    Args:
        logger: Name of the package's logger.
        level: Lowest level that is let through.
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
    def quiet(bar: Any, *args: Any, **settings: Any) -> None:
        initialise(bar, *args, **{**settings, "disable": True})

    return quiet
