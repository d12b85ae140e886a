"""Names that a recipe can use: strategies, recoveries, evaluators and exporters.

Built-in ones are found by module path and imported when first asked for, third-party ones by
entry point. Nothing here imports torch, so listing names costs nothing.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.metadata import entry_points
from typing import TYPE_CHECKING, Generic, TypeVar

from slm_plugin.errors import SlmError, UserError

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


class Registry(Generic[T]):
    """One kind of named component.

    Args:
        kind: What the components are called in messages, as ``pruner``.
        builtin: Module that registers each built-in name when it is imported.
    """

    def __init__(self, kind: str, builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self.group = f"slm_plugin.{kind}s" if kind != "recovery" else "slm_plugin.recoveries"
        self._builtin = dict(builtin)
        self._classes: dict[str, type[T]] = {}

    def register(self, name: str) -> Callable[[type[T]], type[T]]:
        """Class decorator that makes a component known under a name.

        Raises:
            SlmError: The name is taken by another class.
        """

        def add(cls: type[T]) -> type[T]:
            holder = self._classes.get(name)
            if holder is not None and holder.__qualname__ != cls.__qualname__:
                raise SlmError(f"the {self.kind} name '{name}' is taken by {holder.__qualname__}")
            if name in self._builtin and cls.__module__ != self._builtin[name]:
                raise SlmError(f"the {self.kind} name '{name}' is taken by a built-in one")
            cls.name = name  # type: ignore[attr-defined]
            self._classes[name] = cls
            return cls

        return add

    def names(self) -> list[str]:
        """All names, sorted: built-in, registered and installed as plugins."""
        installed = {point.name for point in entry_points(group=self.group)}
        return sorted({*self._builtin, *self._classes, *installed})

    def get(self, name: str) -> type[T]:
        """The class of a name.

        Raises:
            UserError: Nobody knows the name, or the plugin that offers it fails to import.
        """
        if name in self._classes:
            return self._classes[name]
        if name in self._builtin:
            import_module(self._builtin[name])
            return self._classes[name]
        for point in entry_points(group=self.group):
            if point.name == name:
                return self._load(point.name, point.load, point.value)
        guess = nearest(name, self.names())
        raise UserError(
            f"no {self.kind} is called '{name}'",
            hint=f"did you mean '{guess}'?" if guess else f"known: {', '.join(self.names())}",
        )

    def _load(self, name: str, load: Callable[[], type[T]], value: str) -> type[T]:
        try:
            cls = load()
        except Exception as error:
            raise UserError(
                f"the {self.kind} plugin '{name}' ({value}) cannot be imported: {error}",
                hint="update or uninstall the package that provides it",
            ) from error
        return self._classes.get(name) or self.register(name)(cls)


pruners: Registry[Pruner] = Registry(
    "pruner",
    {
        "angular": "slm_plugin.pruners.depth.angular",
        "block_influence": "slm_plugin.pruners.depth.block_influence",
        "deepest": "slm_plugin.pruners.depth.deepest",
        "laco": "slm_plugin.pruners.depth.laco",
        "merge_concat": "slm_plugin.pruners.depth.merge_concat",
        "shapley": "slm_plugin.pruners.depth.shapley",
        "shortened": "slm_plugin.pruners.depth.shortened",
        "sleb": "slm_plugin.pruners.depth.sleb",
        "slm": "slm_plugin.pruners.depth.slm",
        "streamline": "slm_plugin.pruners.depth.streamline",
        "sublayer": "slm_plugin.pruners.depth.sublayer",
        "torch_pruning": "slm_plugin.pruners.width.torch_pruning",
    },
)
recoveries: Registry[Recovery] = Registry(
    "recovery",
    {
        "fold_linear": "slm_plugin.recovery.fold_linear",
        "ghost": "slm_plugin.recovery.ghost",
        "linear_patch": "slm_plugin.recovery.linear_patch",
        "lora": "slm_plugin.recovery.lora",
        "refit": "slm_plugin.recovery.refit",
        "rescale": "slm_plugin.recovery.rescale",
        "streamline": "slm_plugin.recovery.streamline",
    },
)
evaluators: Registry[Evaluator] = Registry(
    "evaluator",
    {
        "perplexity": "slm_plugin.evaluation.perplexity",
        "lm_eval": "slm_plugin.evaluation.lm_eval",
        "latency": "slm_plugin.evaluation.latency",
        "footprint": "slm_plugin.evaluation.footprint",
    },
)
exporters: Registry[Exporter] = Registry(
    "exporter",
    {
        "checkpoint": "slm_plugin.export.checkpoint",
        "onnx": "slm_plugin.export.onnx",
    },
)

register_pruner = pruners.register
register_recovery = recoveries.register
register_evaluator = evaluators.register
register_exporter = exporters.register


def list_pruners() -> list[str]:
    """Names of all depth and width strategies that a recipe can use."""
    return pruners.names()
