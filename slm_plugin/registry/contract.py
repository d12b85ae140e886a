"""The contract of third-party components, and the attribution of their errors."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from pydantic import BaseModel

from slm_plugin.foreign import contained, is_ours, reason, undone
from slm_plugin.progress import say
from slm_plugin.target import KINDS

HINT = "SLM_PLUGIN_TRACEBACK=1 shows where; tell those who make it"


@dataclass(frozen=True, slots=True)
class Contract:
    """The requirements on all components of one kind.

    Attributes:
        base: Their base class, as ``module:name``, imported when needed.
        calls: Their methods and properties that are called.
        reserved: Names that no option may have, because they are other keys of an entry.
        renamed: Former and present names of methods, for a message to authors.
    """

    base: str
    calls: tuple[str, ...]
    reserved: frozenset[str] = field(default=frozenset())
    renamed: tuple[tuple[str, str], ...] = ()

    def fault(self, cls: Any) -> str:
        """Why a class cannot be used; empty when it can."""
        base = _named(self.base)
        if not isinstance(cls, type):
            return f"it is {article(type(cls).__name__)}, and no class"
        if not issubclass(cls, base):
            return f"{cls.__qualname__} is no subclass of {self.base.replace(':', '.')}"
        missing = sorted(getattr(cls, "__abstractmethods__", ()))
        if missing:
            return f"{cls.__qualname__} does not implement {', '.join(missing)}"
        for former, present in self.renamed:
            if hasattr(cls, former) and getattr(cls, present) is getattr(base, present):
                return f"{cls.__qualname__}.{former} is not called any more; name it {present}"
        if not isinstance(cls.__doc__, str | None):
            return "its docstring is no text"
        extra = getattr(cls, "extra", None)
        if not isinstance(extra, str | None):
            return f"its extra is {extra!r}, and no name"
        return _options_fault(cls, base, self.reserved) or _pruner_fault(cls)

    def contain(self, cls: type[Any], what: str) -> None:
        """Attribute every exception of the class's own code to it.

        Return values are checked by the callers (`slm_plugin.returned`).

        Args:
            cls: A class without fault.
            what: Name of the component in errors.
        """
        # A private name, because a plugin may have its own `label`.
        cls._slm_plugin_label = what
        for name in ("__init__", *self.calls):
            own = inspect.getattr_static(cls, name, None)
            # Methods inherited from this package need no guard.
            holder = next((kind for kind in cls.__mro__ if name in vars(kind)), cls)
            if is_ours(holder) or getattr(getattr(own, "fget", own), "contained", False):
                continue
            asked = isinstance(inspect.getattr_static(_named(self.base), name), property)
            if name == "__init__":
                own = _whole(own, _named(self.base))
            if not asked:
                setattr(cls, name, _guarded(own, name, what))
            elif hasattr(type(own), "__get__"):
                setattr(cls, name, property(_guarded(own, name, what, asked=True)))


@contextmanager
def cleaned(what: str) -> Iterator[None]:
    """Undo changes of foreign code to the process, and report them.

    Args:
        what: Name of the component.
    """
    put_back: list[str] = []
    try:
        with undone() as put_back:
            yield
    finally:
        tell_put_back(what, put_back)


def tell_put_back(what: str, put_back: list[str]) -> None:
    """Report the changes that were undone, if any."""
    if put_back:
        say(f"  warning: {what} left changed, and it was put back: {', '.join(put_back)}")


def _whole(constructor: Any, base: Any) -> Callable[..., None]:
    """A constructor that checks the attributes set by the base class's constructor."""

    @functools.wraps(constructor)
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        constructor(self, *args, **kwargs)
        for name in [*inspect.signature(base.__init__).parameters][1:]:
            if not hasattr(self, name):
                raise AttributeError(f"it sets no `{name}`; call super().__init__")

    return made


def _guarded(own: Any, name: str, what: str, *, asked: bool = False) -> Callable[..., Any]:
    """A class attribute of any kind as a function whose exceptions are attributed to the class."""
    place = f"{what} failed in {name.strip('_')}"

    @functools.wraps(own, updated=())
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        with cleaned(what), contained(place, hint=HINT):
            found = own.__get__(self, type(self)) if hasattr(type(own), "__get__") else own
            return found if asked else found(*args, **kwargs)

    guarded.contained = True  # type: ignore[attr-defined]
    return guarded


def _options_fault(cls: Any, base: Any, reserved: frozenset[str]) -> str:
    options = getattr(cls, "Options", None)
    wanted = base.Options if base.Options.model_fields else BaseModel
    if not (isinstance(options, type) and issubclass(options, wanted)):
        return f"its Options are no subclass of {wanted.__module__}.{wanted.__name__}"
    if options.model_config.get("extra") != "forbid":
        return "its Options take unknown keys; set model_config = ConfigDict(extra='forbid')"
    clash = sorted(reserved & options.model_fields.keys())
    if clash:
        return f"its option '{clash[0]}' is a key that every entry has"
    try:
        options.model_json_schema()
        for each in options.model_fields.values():
            repr(each.default)
    except Exception as error:
        return f"its Options cannot be shown: {reason(error)}"
    return ""


def _pruner_fault(cls: Any) -> str:
    """Check a strategy's kind and targets; other components have none."""
    if "targets" not in _annotated(cls):
        return ""
    kind, targets = getattr(cls, "kind", None), getattr(cls, "targets", None)
    if kind not in ("depth", "width", "hybrid"):
        return f"its kind is {kind!r}, and none of 'depth', 'width' and 'hybrid'"
    if not isinstance(targets, tuple | list) or not targets or not {*targets} <= {*KINDS}:
        return f"its targets are {targets!r}, and not some of {', '.join(KINDS)}"
    return ""


def _annotated(cls: type[Any]) -> set[str]:
    return {name for kind in cls.__mro__ for name in vars(kind).get("__annotations__", {})}


def _named(path: str) -> Any:
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


def article(word: str) -> str:
    """A word with its indefinite article."""
    return f"{'an' if word[:1].lower() in 'aeiou' else 'a'} {word}"
