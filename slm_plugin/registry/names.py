"""Names that a recipe can use: strategies, recoveries, evaluators and exporters.

Built-in ones are found by module path and imported when first asked for, third-party ones by
entry point. Nothing here imports torch, so listing names costs nothing.
"""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from slm_plugin.errors import SlmError, UserError
from slm_plugin.foreign import contained, is_ours, says_one_line
from slm_plugin.progress import say
from slm_plugin.registry.contract import Contract, article, cleaned
from slm_plugin.registry.installed import distribution_of, points

if TYPE_CHECKING:
    from slm_plugin.evaluation.base import Evaluator
    from slm_plugin.export.base import Exporter
    from slm_plugin.pruners.base import Pruner
    from slm_plugin.recovery.base import Recovery

T = TypeVar("T")


def nearest(name: str, known: Iterator[str] | list[str] | tuple[str, ...]) -> str | None:
    """The known name that a misspelt one most likely meant."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return close[0] if close else None


@dataclass(frozen=True, slots=True)
class Fault:
    """A plugin that cannot be used, or only in part.

    Attributes:
        kind: What the component is.
        name: The name that it is offered under.
        message: One line that names plugin and distribution and says what is wrong.
        usable: Whether the name works all the same.
    """

    kind: str
    name: str
    message: str
    usable: bool


class Registry(Generic[T]):
    """One kind of named component.

    Args:
        kind: What the components are called in messages, as ``pruner``.
        builtin: Module that registers each built-in name when it is imported.
        contract: What a component has to be; without one everything is taken.
        taken: Names that mean something else where components are named.
    """

    def __init__(
        self,
        kind: str,
        builtin: Mapping[str, str],
        contract: Contract | None = None,
        taken: tuple[str, ...] = (),
    ) -> None:
        self.kind = kind
        self.group = f"slm_plugin.{kind}s" if kind != "recovery" else "slm_plugin.recoveries"
        self._builtin = dict(builtin)
        self._classes: dict[str, type[T]] = {}
        self._contract = contract
        self._taken = taken
        self._told: set[str] = set()

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that makes a component known under a name.

        Raises:
            SlmError: The name is taken by another class.
            UserError: The name or the class cannot be used.
        """

        def add(cls: type[T]) -> type[T]:
            holder = self._classes.get(name)
            if holder is not None and holder.__qualname__ != cls.__qualname__:
                raise SlmError(f"the {self.kind} name '{name}' is taken by {holder.__qualname__}")
            if name in self._builtin and cls.__module__ != self._builtin[name]:
                raise SlmError(f"the {self.kind} name '{name}' is taken by a built-in one")
            return self._add(name, cls, f"the {self.kind} '{name}'", ours=is_ours(cls))

        return add

    def names(self) -> list[str]:
        """All names, sorted: built-in, registered and installed as plugins."""
        return sorted({*self._builtin, *self._classes, *self._offers()})

    def get(self, name: str) -> type[T]:
        """The class of a name.

        Raises:
            UserError: Nobody knows the name, or the plugin that offers it cannot be used.
        """
        if name in self._builtin:
            if name not in self._classes:
                import_module(self._builtin[name])
            return self._classes[name]
        offers = self._offers().get(name, [])
        if len(offers) > 1:
            raise UserError(self._clash(name, offers), hint="uninstall all of them but one")
        if name in self._classes:
            return self._classes[name]
        if offers:
            return self._load(offers[0])
        for other in (pruners, recoveries, evaluators, exporters):
            if other is not self and name in other._builtin:
                raise UserError(
                    f"no {self.kind} is called '{name}'",
                    hint=f"it is the name of {article(other.kind)}",
                )
        guess = nearest(name, self.names())
        raise UserError(
            f"no {self.kind} is called '{name}'",
            hint=f"did you mean '{guess}'?" if guess else f"known: {', '.join(self.names())}",
        )

    def usable(self) -> dict[str, type[T]]:
        """All classes by their names, sorted; one line is said for every plugin that is none."""
        faults = {fault.name: fault for fault in self.faults() if not fault.usable}
        for fault in faults.values():
            self._tell(fault.message)
        return {name: self.get(name) for name in self.names() if name not in faults}

    def tell_shadowed(self, name: str) -> None:
        """Say once that a plugin is not what a name means, as a built-in component has it."""
        if name in self._builtin:
            for point in self._offers().get(name, []):
                self._tell(self._shadowed(point))

    def _tell(self, message: str) -> None:
        if message not in self._told:
            self._told.add(message)
            say(f"warning: {message}")

    def _shadowed(self, point: EntryPoint) -> str:
        return f"{self._label(point)} is ignored: the name is that of a built-in one"

    def faults(self) -> list[Fault]:
        """What is wrong with installed plugins; this imports all of them."""
        found = []
        for name, offers in sorted(self._offers().items()):
            if name in self._builtin:
                shadowed = (self._shadowed(point) for point in offers)
                found += [Fault(self.kind, name, message, usable=True) for message in shadowed]
                continue
            try:
                cls = self.get(name)
            except SlmError as error:
                found.append(Fault(self.kind, name, str(error), usable=False))
                continue
            if not (cls.__doc__ or "").strip() and sys.flags.optimize < 2:
                message = f"{self._label(offers[0])} has no docstring that says what it does"
                found.append(Fault(self.kind, name, message, usable=True))
        return found

    def _offers(self) -> dict[str, list[EntryPoint]]:
        """Entry points of this kind by name; two of one name are from two distributions."""
        found: dict[str, list[EntryPoint]] = {}
        for point in points(self.group):
            known = found.setdefault(point.name, [])
            if (point.value, distribution_of(point)) not in [
                (one.value, distribution_of(one)) for one in known
            ]:
                known.append(point)
        return found

    def _load(self, point: EntryPoint) -> type[T]:
        said, hint = self._label(point), "update or uninstall the package that provides it"
        if not point.name.isidentifier() or point.name in self._taken:
            raise UserError(f"{said} has a name that no recipe can use", hint=hint)
        failed = contained(f"{said} cannot be imported", UserError, hint, computes=False)
        # What it prints would end up among the results.
        with cleaned(said), failed, redirect_stdout(sys.stderr):
            try:
                cls = point.load()
            except SlmError as error:
                if not says_one_line(error):
                    raise
                raise UserError(
                    f"{said} cannot be imported: {error.message}", hint=error.hint or hint
                ) from error
        known = self._classes.get(point.name)
        if known is not None and known is not cls:
            raise UserError(f"{said} registers another class by that name", hint=hint)
        return self._add(point.name, cls, said)

    def _add(self, name: str, cls: Any, said: str, *, ours: bool = False) -> type[T]:
        hint = "docs/plugins.md says what a component has to be"
        if not ours and self._contract is not None:
            if not name.isidentifier() or name in self._taken:
                raise UserError(f"{said} has a name that no recipe can use", hint=hint)
            with contained(f"{said} cannot be looked at", UserError, hint, computes=False):
                fault = self._contract.fault(cls) or self._other_name(name, cls)
                if fault:
                    raise UserError(f"{said} cannot be used: {fault}", hint=hint)
                self._contract.contain(cls, said)
        with contained(f"{said} cannot be used", UserError, hint, computes=False):
            cls.name = name
        self._classes[name] = cls
        made: type[T] = cls
        return made

    def _other_name(self, name: str, cls: type[T]) -> str:
        """A class knows one name, so it cannot have another beside it."""
        others = [other for other, one in self._classes.items() if one is cls and other != name]
        return f"it is the {self.kind} '{others[0]}'" if others else ""

    def _label(self, point: EntryPoint) -> str:
        return f"the {self.kind} plugin '{point.name}' of {distribution_of(point)}"

    def _clash(self, name: str, offers: list[EntryPoint]) -> str:
        who = " and by ".join(sorted(distribution_of(point) for point in offers))
        return f"the {self.kind} plugin '{name}' is offered by {who}"


_PRUNER = Contract(
    "slm_plugin.pruners.base:Pruner",
    ("plan", "check_target", "followed_by", "needs_calibration", "unsuited"),
    reserved=frozenset({"prune", "target", "label", "recover"}),
)
_RECOVERY = Contract(
    "slm_plugin.recovery.base:Recovery",
    ("recover", "needs_calibration", "unsuited"),
    reserved=frozenset({"recover"}),
)
_EVALUATOR = Contract(
    "slm_plugin.evaluation.base:Evaluator",
    ("measure", "check", "load", "check_model", "unsuited"),
    renamed=(("fit", "check_model"),),
)
_EXPORTER = Contract("slm_plugin.export.base:Exporter", ("export", "check_model", "unsuited"))
pruners: Registry[Pruner] = Registry(
    "pruner",
    {
        "angular": "slm_plugin.pruners.depth.angular",
        "block_influence": "slm_plugin.pruners.depth.block_influence",
        "deepest": "slm_plugin.pruners.depth.deepest",
        "experts": "slm_plugin.pruners.width.experts",
        "hybrid": "slm_plugin.pruners.hybrid.hybrid",
        "laco": "slm_plugin.pruners.depth.laco",
        "layer_sparsity": "slm_plugin.pruners.depth.layer_sparsity",
        "merge_concat": "slm_plugin.pruners.depth.merge_concat",
        "repaired": "slm_plugin.pruners.depth.repaired",
        "shapley": "slm_plugin.pruners.depth.shapley",
        "shortened": "slm_plugin.pruners.depth.shortened",
        "sleb": "slm_plugin.pruners.depth.sleb",
        "slm": "slm_plugin.pruners.depth.slm",
        "streamline": "slm_plugin.pruners.depth.streamline",
        "sublayer": "slm_plugin.pruners.depth.sublayer",
        "torch_pruning": "slm_plugin.pruners.width.torch_pruning",
        "width": "slm_plugin.pruners.width.width",
    },
    _PRUNER,
)
recoveries: Registry[Recovery] = Registry(
    "recovery",
    {
        "fold_linear": "slm_plugin.recovery.closed_form.fold_linear",
        "ghost": "slm_plugin.recovery.closed_form.ghost",
        "linear_patch": "slm_plugin.recovery.closed_form.linear_patch",
        "lora": "slm_plugin.recovery.training.lora",
        "refit": "slm_plugin.recovery.closed_form.refit",
        "rescale": "slm_plugin.recovery.closed_form.rescale",
        "streamline": "slm_plugin.recovery.training.streamline",
    },
    _RECOVERY,
    taken=("none",),
)
evaluators: Registry[Evaluator] = Registry(
    "evaluator",
    {
        "perplexity": "slm_plugin.evaluation.perplexity",
        "lm_eval": "slm_plugin.evaluation.lm_eval",
        "latency": "slm_plugin.evaluation.latency",
        "footprint": "slm_plugin.evaluation.footprint",
    },
    _EVALUATOR,
)
exporters: Registry[Exporter] = Registry(
    "exporter",
    {
        "checkpoint": "slm_plugin.export.checkpoint",
        "onnx": "slm_plugin.export.onnx",
    },
    _EXPORTER,
)

register_pruner = pruners.register
register_recovery = recoveries.register
register_evaluator = evaluators.register
register_exporter = exporters.register
