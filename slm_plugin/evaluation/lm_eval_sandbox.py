"""Prevent lm-eval from running code from templates and from the Hub."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from typing import Any


class _RefusedEvaluate:
    """The package ``evaluate`` looks for a metric's code in the working directory and the Hub."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        """Raise for the package, and leave all others to the next finder."""
        if name == "evaluate":
            raise ImportError("the package evaluate runs code from the Hub, which is not allowed")
        return None


def _refuse(*_: Any, **__: Any) -> None:
    raise ImportError("evaluate.load runs code from the Hub, which is not allowed")


@contextmanager
def sandboxed() -> Iterator[None]:
    """Render templates in a sandbox and block metrics from the Hub.

    Outside a sandbox, a jinja template can run any Python code through attributes.
    """
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from lm_eval import utils

    own = utils.env
    safe = ImmutableSandboxedEnvironment(
        loader=own.loader, undefined=own.undefined, keep_trailing_newline=own.keep_trailing_newline
    )
    safe.filters.update(own.filters)
    utils.env = safe
    loaded: Any = sys.modules.get("evaluate")
    load = getattr(loaded, "load", None)
    if loaded is not None:
        loaded.load = _refuse
    sys.meta_path.insert(0, _RefusedEvaluate)
    try:
        yield
    finally:
        utils.env = own
        sys.meta_path.remove(_RefusedEvaluate)
        if loaded is not None:
            loaded.load = load
