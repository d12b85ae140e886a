"""Keeping lm-eval from running code that nobody installed: in templates, and from the Hub."""

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
        """Refuse the package, and leave all others to the finders behind."""
        if name == "evaluate":
            raise ImportError("the package evaluate runs code from the Hub, which is not done here")
        return None


def _refuse(*_: Any, **__: Any) -> None:
    raise ImportError("evaluate.load runs code from the Hub, which is not done here")


@contextmanager
def sandboxed() -> Iterator[None]:
    """Render templates in a sandbox, as transformers renders chat templates, and fetch no metric.

    A template of jinja reaches all of Python through the attributes of any text.
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
