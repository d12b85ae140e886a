"""A recipe: one compression run from beginning to end, checked whole before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from slm_plugin.calibration.samples import CalibrationSource
from slm_plugin.evaluation.base import Evaluator
from slm_plugin.export.base import Exporter
from slm_plugin.models.loading import ModelSource
from slm_plugin.outputs.place import Input
from slm_plugin.pruners.base import Pruner
from slm_plugin.recipe.checking import check_extra, known_class, unstreamable, validated
from slm_plugin.recipe.document import Place, Problem, checked, read_file
from slm_plugin.recipe.inputs import inputs_of, output_of, refuse_twice
from slm_plugin.recipe.parts import Common, check_calibration, component, entries, named_entry
from slm_plugin.recovery.base import Recovery
from slm_plugin.registry import evaluators, exporters, nearest, pruners, recoveries
from slm_plugin.target import Target

Stage = Pruner | Recovery


class Frame(Common):
    """The keys at the top of a recipe; the entries of its lists are checked one by one."""

    stages: Annotated[
        tuple[Any, ...], Field(description="what to do, in order: prune or recover")
    ] = ()
    export: Annotated[
        tuple[str | dict[str, Any] | None, ...], Field(description="what to write")
    ] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe, its components made and ready.

    Attributes:
        name: What the run is called in reports: the file's stem.
        data: The recipe as plain data, overrides included.
        inputs: What the run reads of this disk, which its output must leave alone.
    """

    name: str
    model: ModelSource
    calibration: CalibrationSource | None
    stages: tuple[Stage, ...]
    evaluators: tuple[Evaluator, ...]
    exporters: tuple[Exporter, ...]
    output: Path
    seed: int
    data: Mapping[str, Any]
    inputs: tuple[Input, ...] = ()

    @classmethod
    def read(cls, path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
        """Read and check a recipe file.

        Args:
            path: The YAML file.
            overrides: Settings as ``stages.0.target.ratio=0.2``; values are YAML.

        Raises:
            RecipeError: The file cannot be read or has mistakes; the message lists all of them,
                a line each, with file, line and column.
        """
        path = Path(path)
        text = read_file(path, "recipe")
        return checked(text, str(path), overrides, partial(_build, cls, path.stem, path))

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        name: str = "recipe",
        origin: str = "recipe",
        overrides: Sequence[str] = (),
    ) -> Recipe:
        """Check a recipe that is given as YAML text.

        Args:
            text: The YAML text.
            name: What the run is called in reports.
            origin: What messages call the text.
            overrides: Settings as ``stages.0.target.ratio=0.2``; values are YAML.

        Raises:
            RecipeError: The text has mistakes; the message lists all of them, a line each.
        """
        return checked(text, origin, overrides, partial(_build, cls, name, None))


def _build(
    cls: type[Recipe], name: str, file: Path | None, data: Any, problems: list[Problem]
) -> Recipe | None:
    if not isinstance(data, dict):
        problems.append(Problem((), "a recipe is a mapping with the keys version, model, …"))
        return None
    frame = validated(Frame, data, (), problems)
    # Lists are checked even when the frame is not whole: one reading shows all mistakes.
    stages = [
        stage
        for index, entry in entries(data, "stages")
        if (stage := _stage(entry, ("stages", index), problems)) is not None
    ]
    made: dict[str, list[Any]] = {"evaluate": [], "export": []}
    for key, registry in (("evaluate", evaluators), ("export", exporters)):
        for index, entry in entries(data, key):
            one = named_entry(registry, entry, (key, index), problems)
            if one is not None:
                made[key].append(one)
    _check_ratios(stages, problems)
    refuse_twice([exporter.name for exporter in made["export"]], problems)
    if not problems:
        # With a mistake before it, a stage would be told by another's number.
        problems += _misplaced(stages, made["export"])
    if frame is None:
        return None
    inputs = inputs_of(data, file)
    output = output_of(frame.output, inputs, problems)
    wanting: dict[Place, Stage] = {("stages", index): stage for index, stage in enumerate(stages)}
    check_calibration(frame.calibration, wanting, problems)
    if frame.model.memory == "layerwise" and not problems:
        problems += unstreamable({"stages": stages, **made}, frame.calibration)
    if problems or output is None:
        return None
    return cls(
        name=name,
        model=frame.model,
        calibration=frame.calibration,
        stages=tuple(stages),
        evaluators=tuple(made["evaluate"]),
        exporters=tuple(made["export"]),
        output=output,
        seed=frame.seed,
        data=data,
        inputs=inputs,
    )


def _stage(entry: Any, place: Place, problems: list[Problem]) -> Stage | None:
    if not isinstance(entry, dict):
        problems.append(Problem(place, "a stage is a mapping that begins with prune: or recover:"))
        return None
    verbs = [verb for verb in ("prune", "recover") if verb in entry]
    if len(verbs) != 1:
        guess = next((nearest(str(k), ["prune", "recover"]) for k in entry), None)
        hint = f"; did you mean '{guess}:'?" if guess and not verbs else ""
        problems.append(Problem(place, f"a stage has exactly one of prune: and recover:{hint}"))
        return None
    verb = verbs[0]
    rest = {key: value for key, value in entry.items() if key != verb}
    if verb == "recover":
        recovery: Recovery | None = component(recoveries, entry[verb], rest, place, verb, problems)
        return recovery
    before = len(problems)
    target = None
    if "target" not in rest:
        problems.append(Problem(place, "the key 'target' is missing, as in `target: {ratio: 0.2}`"))
    else:
        target = validated(Target, rest.pop("target"), (*place, "target"), problems)
    found = known_class(pruners, entry[verb], (*place, verb), problems)
    if found is None:
        return None
    options = validated(found.Options, rest, place, problems)
    if target is not None and target.kind not in found.targets:
        known = ", ".join(found.targets)
        problems.append(
            Problem(
                (*place, "target", target.kind),
                f"{entry[verb]} takes no target of kind '{target.kind}'; it takes: {known}",
            )
        )
    check_extra(found, (*place, verb), problems)
    if options is None or target is None or len(problems) > before:
        return None
    pruner: Pruner = found(options, target)
    return pruner


def _misplaced(stages: Sequence[Stage], exporters: Sequence[Exporter]) -> Iterator[Problem]:
    """What cannot be once a recovery has put operators between layers."""
    places = [i for i, s in enumerate(stages) if isinstance(s, Recovery) and s.operators]
    if not places:
        return
    name = stages[places[0]].name
    for index, stage in enumerate(stages[places[0] + 1 :], start=places[0] + 1):
        if isinstance(stage, Pruner) or stage.reference:
            yield Problem(
                ("stages", index),
                f"'{stage.name}' cannot come behind '{name}', which puts operators between layers; "
                f"move it before '{name}' or leave one out",
            )
    for index, exporter in enumerate(exporters):
        if not exporter.operators:
            yield Problem(
                ("export", index, exporter.name),
                f"'{exporter.name}' cannot hold the operators that '{name}' puts between layers; "
                "export `onnx`, or repair by `fold_linear` or `refit`",
            )


def _check_ratios(stages: list[Stage], problems: list[Problem]) -> None:
    shares = [
        stage.target.ratio
        for stage in stages
        if isinstance(stage, Pruner) and stage.target.of == "original" and stage.target.ratio
    ]
    if sum(shares) >= 1:
        problems.append(
            Problem(
                ("stages",),
                f"the ratios add up to {sum(shares):.0%} of the original model; nothing would stay",
            )
        )
