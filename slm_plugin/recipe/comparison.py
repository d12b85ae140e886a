"""A comparison: many methods on one model, checked whole before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, Field

from slm_plugin.calibration.samples import CalibrationSource
from slm_plugin.evaluation.base import Evaluator
from slm_plugin.models.loading import ModelSource
from slm_plugin.outputs.place import Input
from slm_plugin.pruners.base import Pruner
from slm_plugin.recipe.checking import check_extra, known_class, unstreamable, validated
from slm_plugin.recipe.document import Place, Problem, checked, read_file
from slm_plugin.recipe.inputs import inputs_of, output_of
from slm_plugin.recipe.parts import Common, check_calibration, component, entries, named_entry
from slm_plugin.recovery.base import Recovery
from slm_plugin.registry import evaluators, pruners, recoveries
from slm_plugin.target import Target

AS_PRUNED = "none"
# Keys of a method that are none of the strategy's options.
_OWN = ("prune", "label", "recover")


class ComparisonFrame(Common):
    """The keys at the top of a comparison; the entries of its lists are checked one by one."""

    methods: Annotated[
        tuple[Any, ...], Field(min_length=1, description="strategies, each with its options")
    ]
    recover: Annotated[
        tuple[Any, ...],
        Field(min_length=1, description="what follows every method: none, or a recovery"),
    ] = (AS_PRUNED,)
    targets: Annotated[
        tuple[Any, ...], Field(min_length=1, description="how much every method removes")
    ]


@dataclass(frozen=True, slots=True)
class Method:
    """One strategy with its options.

    Attributes:
        label: What tables call it.
        strategy: The class.
        options: An instance of the class's ``Options``.
        recoveries: What follows it, each a row of its own; None leaves the model as pruned.
    """

    label: str
    strategy: type[Pruner]
    options: BaseModel
    recoveries: tuple[Recovery | None, ...]

    def at(self, target: Target) -> Pruner:
        """The strategy, ready to plan for a target."""
        return self.strategy(self.options, target)


@dataclass(frozen=True, slots=True)
class Comparison:
    """A checked comparison, its components made and ready.

    Attributes:
        name: What it is called in its report: the file's stem.
        data: The file as plain data, overrides included.
        inputs: What it reads of this disk, which its output must leave alone.
    """

    name: str
    model: ModelSource
    calibration: CalibrationSource | None
    methods: tuple[Method, ...]
    targets: tuple[Target, ...]
    evaluators: tuple[Evaluator, ...]
    output: Path
    seed: int
    data: Mapping[str, Any]
    inputs: tuple[Input, ...] = ()

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Comparison:
        """Read and check a comparison file.

        Args:
            path: The YAML file.
            overrides: Settings as ``targets.0.layers_removed=4``; values are YAML.

        Raises:
            RecipeError: The file cannot be read or has mistakes; the message lists all of them,
                a line each, with file, line and column.
        """
        path = Path(path)
        text = read_file(path, "comparison")
        return checked(text, str(path), overrides, partial(_build, cls, path))


def is_comparison(path: Path) -> bool:
    """Whether a file is a comparison and no recipe, as far as its top tells."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(data, dict) and "methods" in data


def named(name: str, options: BaseModel) -> str:
    """A component with its options that are not the default ones, as ``slm (search: greedy)``."""
    changed = options.model_dump(mode="json", exclude_defaults=True)
    said = ", ".join(f"{key}: {_plain(value)}" for key, value in changed.items())
    return f"{name} ({said})" if said else name


def _plain(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _build(
    cls: type[Comparison], file: Path, data: Any, problems: list[Problem]
) -> Comparison | None:
    if not isinstance(data, dict):
        problems.append(
            Problem((), "a comparison is a mapping with the keys version, model, methods, …")
        )
        return None
    frame = validated(ComparisonFrame, data, (), problems)
    # Lists are checked even when the frame is not whole: one reading shows all mistakes.
    shared: list[Recovery | None] = [None]
    if "recover" in data:
        shared = _recoveries(data, (), problems)
    targets = list(_targets(data, problems))
    methods = [
        method
        for index, entry in entries(data, "methods")
        if (method := _method(entry, ("methods", index), shared, problems)) is not None
    ]
    measured = [
        one
        for index, entry in entries(data, "evaluate")
        if (one := named_entry(evaluators, entry, ("evaluate", index), problems)) is not None
    ]
    if not problems:
        _check_labels(methods, problems)
        _check_kinds(methods, targets, problems)
    inputs = inputs_of(data, file)
    output = None if frame is None else output_of(frame.output, inputs, problems)
    if frame is None or output is None or problems:
        return None
    _check_needs(frame, methods, targets, measured, problems)
    return cls(
        name=file.stem,
        model=frame.model,
        calibration=frame.calibration,
        methods=tuple(methods),
        targets=tuple(targets),
        evaluators=tuple(measured),
        output=output,
        seed=frame.seed,
        data=data,
        inputs=inputs,
    )


def _targets(data: dict[str, Any], problems: list[Problem]) -> Iterator[Target]:
    seen: list[Target] = []
    for index, entry in entries(data, "targets"):
        target = validated(Target, entry, ("targets", index), problems)
        if target in seen:
            problems.append(Problem(("targets", index), "this target is given twice"))
        elif target is not None:
            seen.append(target)
            yield target


def _recoveries(
    data: dict[str, Any], place: Place, problems: list[Problem]
) -> list[Recovery | None]:
    """What follows: entries as in a recipe's stages, or the word none."""
    found: list[Recovery | None] = []
    listed = data["recover"]
    if not isinstance(listed, list) or not listed:
        # The frame says so itself of its own list.
        if place:
            problems.append(Problem((*place, "recover"), "should be a list, as [none]"))
        return [None]
    names = set()
    for index, entry in enumerate(listed):
        where = (*place, "recover", index)
        made = None
        if entry != AS_PRUNED:
            made = _recovery(entry, where, problems)
            if made is None:
                continue
        name = AS_PRUNED if made is None else named(made.name, made.options)
        if name in names:
            problems.append(Problem(where, f"'{name}' is given twice"))
        names.add(name)
        found.append(made)
    return found


def _recovery(entry: Any, place: Place, problems: list[Problem]) -> Recovery | None:
    if not isinstance(entry, dict) or "recover" not in entry:
        problems.append(Problem(place, "an entry is `none` or begins with recover:"))
        return None
    options = {key: value for key, value in entry.items() if key != "recover"}
    made: Recovery | None = component(
        recoveries, entry["recover"], options, place, "recover", problems
    )
    return made


def _method(
    entry: Any, place: Place, shared: list[Recovery | None], problems: list[Problem]
) -> Method | None:
    if not isinstance(entry, dict) or "prune" not in entry:
        problems.append(Problem(place, "a method is a mapping that begins with prune:"))
        return None
    before = len(problems)
    if "target" in entry:
        problems.append(
            Problem((*place, "target"), "all methods share the `targets:` of the comparison")
        )
    label = entry.get("label")
    if label is not None and (not isinstance(label, str) or not label.strip()):
        problems.append(Problem((*place, "label"), "should be a text"))
    followed = _recoveries(entry, place, problems) if "recover" in entry else shared
    found = known_class(pruners, entry["prune"], (*place, "prune"), problems)
    if found is None:
        return None
    rest = {key: value for key, value in entry.items() if key not in (*_OWN, "target")}
    options = validated(found.Options, rest, place, problems)
    check_extra(found, (*place, "prune"), problems)
    if options is None or len(problems) > before:
        return None
    return Method(label or named(found.name, options), found, options, tuple(followed))


def _check_labels(methods: Sequence[Method], problems: list[Problem]) -> None:
    """A row is known by its label alone."""
    labels = [method.label for method in methods]
    for index, label in enumerate(labels):
        if label in labels[:index]:
            place = ("methods", index)
            problems.append(Problem(place, f"another method is called '{label}'; add a `label:`"))


def _check_kinds(
    methods: Sequence[Method], targets: Sequence[Target], problems: list[Problem]
) -> None:
    for index, method in enumerate(methods):
        for number, target in enumerate(targets):
            if target.kind not in method.strategy.targets:
                known = ", ".join(method.strategy.targets)
                problems.append(
                    Problem(
                        ("methods", index, "prune"),
                        f"{method.strategy.name} takes no target of kind '{target.kind}' "
                        f"(targets.{number}); it takes: {known}",
                    )
                )


def _check_needs(
    frame: ComparisonFrame,
    methods: Sequence[Method],
    targets: Sequence[Target],
    measured: Sequence[Evaluator],
    problems: list[Problem],
) -> None:
    """Note what calibration data or the whole model would have to be there for."""
    made = [method.at(targets[0]) for method in methods]
    followed = {id(one): one for method in methods for one in method.recoveries if one is not None}
    wanting: dict[Place, Pruner | Recovery] = {("methods", i): one for i, one in enumerate(made)}
    wanting |= {("recover", i): one for i, one in enumerate(followed.values())}
    check_calibration(frame.calibration, wanting, problems)
    if frame.model.memory == "layerwise" and not problems:
        parts: dict[str, Sequence[Any]] = {
            "methods": made,
            "recover": list(followed.values()),
            "evaluate": measured,
        }
        problems += unstreamable(parts, frame.calibration)
