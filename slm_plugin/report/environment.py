"""The one way in which templates are read: numbers look alike wherever they are shown."""

from __future__ import annotations

from collections.abc import Callable

from jinja2 import Environment, PackageLoader, StrictUndefined

from slm_plugin.report import numbers


def environment(*, finalize: Callable[[object], object] | None = None) -> Environment:
    """A jinja environment over the package's templates; a name that is missing is an error.

    Args:
        finalize: Applied to everything that an expression puts out, in place of the escaping for
            HTML that is the default.
    """
    made = Environment(
        loader=PackageLoader("slm_plugin.report"),
        autoescape=finalize is None,
        finalize=finalize,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    shared = (numbers.number, numbers.quantity, numbers.count, numbers.duration, numbers.change)
    made.filters |= {function.__name__: function for function in shared}
    return made
