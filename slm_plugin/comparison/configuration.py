"""A comparison file: many methods on one model, checked completely before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar
from unicodedata import category

from pydantic import BaseModel, Field

from slm_plugin.control_characters import visible
from slm_plugin.evaluation.base import Evaluator
from slm_plugin.pruners.base import Pruner
from slm_plugin.recipe.checked_file import CheckedFile
from slm_plugin.recipe.checking import known_class, unstreamable, validated
from slm_plugin.recipe.document import has_key, read_file
from slm_plugin.recipe.mistakes import Mistakes, Placed, Problem
from slm_plugin.recipe.operators import misplaced
from slm_plugin.recipe.parsing import Recipe
from slm_plugin.recipe.parts import (
    Common,
    check_calibration,
    check_surroundings,
    component,
    entries,
    following,
    in_turn,
    named_entries,
    stored_config,
    stored_family,
    stored_layers,
    unsuited,
)
from slm_plugin.recovery.base import Recovery
from slm_plugin.registry import evaluators, pruners, recoveries
from slm_plugin.target import Target
from slm_plugin.texts import shown_path

AS_PRUNED = "none"
ONLY_DECODERS = "comparisons are of plain decoders, whose text can be measured"
# Keys of a method that are not options of the strategy.
_OWN = ("prune", "label", "recover")


class ComparisonFrame(Common):
    """The keys at the top of a comparison; the entries of its lists are checked one by one."""

    methods: Annotated[
        tuple[Any, ...], Field(min_length=1, description="strategies, each with its options")
    ]
    recover: Annotated[
        tuple[Any, ...],
        Field(min_length=1, description="the recovery after every method: none, or a recovery"),
    ] = (AS_PRUNED,)
    targets: Annotated[
        tuple[Any, ...], Field(min_length=1, description="how much every method removes")
    ]


@dataclass(frozen=True, slots=True)
class Method:
    """One strategy with its options.

    Attributes:
        label: Name in tables.
        strategy: The class.
        options: An instance of the class's ``Options``.
        recoveries: The recoveries to run after it, a row each; None is no recovery.
        restoration: The recovery that belongs to the strategy and runs first in every row.
    """

    label: str
    strategy: type[Pruner]
    options: BaseModel
    recoveries: tuple[Recovery | None, ...]
    restoration: Recovery | None = None

    def at(self, target: Target) -> Pruner:
        """The strategy, ready to plan for a target."""
        return self.strategy(self.options, target)

    def behind(self, recovery: Recovery | None) -> list[Recovery]:
        """What runs behind the strategy in the row of a recovery."""
        return in_turn(self.restoration, recovery)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison(CheckedFile):
    """A checked comparison with its components created.

    Attributes:
        methods: What is compared.
        targets: How much every method removes.
    """

    kind: ClassVar[str] = "comparison"
    told_by: ClassVar = ("methods", "stages", "run")
    first_keys: ClassVar[str] = "version, model, methods"
    frame: ClassVar[type[Common]] = ComparisonFrame

    methods: tuple[Method, ...]
    targets: tuple[Target, ...]

    @classmethod
    def _own_fields(
        cls, frame: Any | None, data: dict[str, Any], mistakes: Mistakes
    ) -> dict[str, Any]:
        followed: list[Placed[Recovery]] = []
        shared: list[Recovery | None] = [None]
        if "recover" in data:
            shared = _recoveries(data, followed, mistakes)
        targets = list(_targets(data, mistakes))
        methods = [
            Placed(place, method)
            for index, entry in entries(data, "methods")
            if (
                method := _method(
                    entry, shared, followed, mistakes.below(*(place := ("methods", index)))
                )
            )
            is not None
        ]
        measured: list[Placed[Evaluator]] = named_entries(evaluators, data, "evaluate", mistakes)
        if targets:
            methods = [_restored(method, targets[0].component, mistakes) for method in methods]
        _check_labels(methods, mistakes)
        _check_kinds(methods, targets, mistakes)
        _check_order(methods, targets, mistakes)
        if frame is not None and frame.model is not None:
            check_surroundings(frame.model, mistakes)
            _check_needs(frame, methods, targets, [*followed, *measured], mistakes)
        elif frame is not None and frame.calibration is not None:
            check_calibration(frame.calibration, (), mistakes)
        return {
            "methods": tuple(one.component for one in methods),
            "targets": tuple(one.component for one in targets),
            "evaluators": tuple(one.component for one in measured),
        }


def read_either(path: Path, overrides: Sequence[str] = ()) -> Recipe | Comparison:
    """Read and check a recipe or a comparison, recognised by its keys.

    The file is read once, so that it may be a pipe.

    Raises:
        RecipeError: The file cannot be read or has mistakes.
    """
    text = read_file(path, "recipe")
    kind = Comparison if has_key(text, "methods") else Recipe
    return kind.parse(text, name=path.stem, origin=shown_path(path), overrides=overrides, file=path)


def named(name: str, options: BaseModel) -> str:
    """A component and its non-default options, as ``slm (search: greedy)``."""
    changed = options.model_dump(mode="json", exclude_defaults=True)
    changes = ", ".join(f"{key}: {_plain(value)}" for key, value in changed.items())
    return f"{name} ({changes})" if changes else name


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _targets(data: dict[str, Any], mistakes: Mistakes) -> Iterator[Placed[Target]]:
    seen: list[Target] = []
    for index, entry in entries(data, "targets"):
        here = mistakes.below("targets", index)
        target = validated(Target, entry, here)
        if target in seen:
            here.add("this target is given twice")
        elif target is not None:
            seen.append(target)
            yield Placed(here.place, target)


def _recoveries(
    data: dict[str, Any], followed: list[Placed[Recovery]], mistakes: Mistakes
) -> list[Recovery | None]:
    """The recoveries of a list, None for the word none; they are added to ``followed``."""
    found: list[Recovery | None] = []
    listed = data["recover"]
    if not isinstance(listed, list) or not listed:
        # The frame reports its own list itself.
        if mistakes.place:
            mistakes.add("should be a list, as [none]", "recover")
        return [None]
    names = set()
    for index, entry in enumerate(listed):
        here = mistakes.below("recover", index)
        made = None
        if entry != AS_PRUNED:
            made = _recovery(entry, here)
            if made is None:
                continue
            followed.append(Placed(here.place, made))
        name = AS_PRUNED if made is None else named(made.name, made.options)
        if name in names:
            here.add(f"'{name}' is given twice")
        names.add(name)
        found.append(made)
    return found


def _recovery(entry: Any, mistakes: Mistakes) -> Recovery | None:
    if not isinstance(entry, dict) or "recover" not in entry:
        mistakes.add("an entry is `none` or begins with recover:")
        return None
    options = {key: value for key, value in entry.items() if key != "recover"}
    made: Recovery | None = component(recoveries, entry["recover"], options, mistakes, "recover")
    return made


def _method(
    entry: Any,
    shared: list[Recovery | None],
    followed: list[Placed[Recovery]],
    mistakes: Mistakes,
) -> Method | None:
    if not isinstance(entry, dict) or "prune" not in entry:
        mistakes.add("a method is a mapping that begins with prune:")
        return None
    before = len(mistakes.found)
    if "target" in entry:
        mistakes.add("all methods share the `targets:` of the comparison", "target")
    label = entry.get("label")
    if label is not None and (not isinstance(label, str) or not label.strip()):
        mistakes.add("should be a text", "label")
    elif label is not None and any(category(character) == "Cc" for character in label):
        mistakes.add(f"has a control character: {visible(label)}", "label")
    after = _recoveries(entry, followed, mistakes) if "recover" in entry else shared
    found = known_class(pruners, entry["prune"], mistakes.below("prune"))
    if found is None:
        return None
    rest = {key: value for key, value in entry.items() if key not in (*_OWN, "target")}
    options = validated(found.Options, rest, mistakes)
    if options is None or len(mistakes.found) > before:
        return None
    return Method(label or named(found.name, options), found, options, tuple(after))


def _restored(method: Placed[Method], target: Target, mistakes: Mistakes) -> Placed[Method]:
    """A method with the recovery that belongs to its strategy, which no target changes."""
    found = following(method.component.at(target), mistakes.at(method.place))
    return Placed(method.place, replace(method.component, restoration=found))


def _check_labels(methods: Sequence[Placed[Method]], mistakes: Mistakes) -> None:
    """Labels must be unique, as they identify rows."""
    labels = [" ".join(method.component.label.split()) for method in methods]
    for index, label in enumerate(labels):
        if label in labels[:index]:
            here = mistakes.at(methods[index].place)
            here.add(f"another method is called '{label}'; add a `label:`")


def _check_kinds(
    methods: Sequence[Placed[Method]],
    targets: Sequence[Placed[Target]],
    mistakes: Mistakes,
) -> None:
    for method in methods:
        strategy = method.component.strategy
        for target in targets:
            if target.component.kind not in strategy.targets:
                known = ", ".join(strategy.targets)
                where = ".".join(map(str, target.place))
                mistakes.at(method.place).add(
                    f"{strategy.name} takes no target of kind '{target.component.kind}' "
                    f"({where}); it takes: {known}",
                    "prune",
                )
                continue
            with mistakes.at(target.place).caught(target.component.kind):
                method.component.at(target.component).check()


def _check_order(
    methods: Sequence[Placed[Method]], targets: Sequence[Placed[Target]], mistakes: Mistakes
) -> None:
    """Check what follows methods that insert operators, which is the same at all targets."""
    for method in methods if targets else ():
        found: list[Problem] = []
        first = method.component.at(targets[0].component)
        for recovery in method.component.recoveries:
            row: list[Pruner | Recovery] = [first, *method.component.behind(recovery)]
            found += misplaced([Placed(method.place, stage) for stage in row])
        mistakes.extend(dict.fromkeys(found))


def _check_needs(
    frame: ComparisonFrame,
    methods: Sequence[Placed[Method]],
    targets: Sequence[Placed[Target]],
    others: Sequence[Placed[Any]],
    mistakes: Mistakes,
) -> None:
    """Check what the components need: calibration data, layers, a model in memory.

    Args:
        frame: Names the calibration data and the model.
        methods: The methods.
        targets: The targets; a strategy needs the same at all of them.
        others: Recoveries and evaluators.
        mistakes: Grows by what is wrong.
    """
    made = [Placed(m.place, m.component.at(targets[0].component)) for m in methods if targets]
    repairs = [one for one in others if isinstance(one.component, Recovery)]
    config = stored_config(frame.model.id)
    family = None
    with mistakes.caught("model", "stack"):
        family = stored_family(config, frame.model.stack)
    if family is not None and family.by_tensors:
        mistakes.add(f"{ONLY_DECODERS}, and {family.architecture} is none", "model", "id")
        return
    check_calibration(frame.calibration, [*made, *repairs], mistakes, family)
    mistakes.extend(unsuited(config, family, [*made, *others]))
    layers = stored_layers(config, family)
    for target in targets:
        removed = target.component.layers_removed
        if layers is not None and removed is not None and removed >= layers:
            mistakes.at(target.place).add(
                f"the model has {layers} layers, at most {layers - 1} can be removed",
                "layers_removed",
            )
    if frame.model.memory == "layerwise":
        mistakes.extend(unstreamable([*made, *others], frame.calibration))
