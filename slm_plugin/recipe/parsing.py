"""A recipe: one compression run, checked completely before anything is loaded."""

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
from slm_plugin.recipe.checking import Placed, check_extra, known_class, unstreamable, validated
from slm_plugin.recipe.document import Place, Problem, checked, checked_data, read_file
from slm_plugin.recipe.inputs import inputs_of, output_of, refuse_twice
from slm_plugin.recipe.parts import (
    Common,
    check_calibration,
    check_surroundings,
    checked_target,
    component,
    entries,
    in_memory,
    named_entries,
    plain,
    stored_layers,
)
from slm_plugin.recovery.base import Recovery
from slm_plugin.registry import evaluators, exporters, nearest, pruners, recoveries
from slm_plugin.target import Target
from slm_plugin.texts import shown_path

Stage = Pruner | Recovery


class Frame(Common):
    """The keys at the top of a recipe; the entries of its lists are checked one by one."""

    stages: Annotated[
        tuple[Any, ...], Field(description="what to do, in order: prune or recover")
    ] = ()
    export: Annotated[tuple[Any, ...], Field(description="what to write")] = ()


@dataclass(frozen=True, slots=True)
class Recipe:
    """A checked recipe with its components created.

    Attributes:
        name: Name of the run in reports: the file's stem.
        model: The model to load; None where the caller passes a model in memory.
        output: The output folder; None where nothing is written.
        data: The recipe as plain data, overrides included.
        inputs: Files that the run reads, which its output must not overwrite.
    """

    name: str
    model: ModelSource | None
    calibration: CalibrationSource | None
    stages: tuple[Stage, ...]
    evaluators: tuple[Evaluator, ...]
    exporters: tuple[Exporter, ...]
    output: Path | None
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
        return cls.parse(
            text, name=path.stem, origin=shown_path(path), overrides=overrides, file=path
        )

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        name: str = "recipe",
        origin: str = "recipe",
        overrides: Sequence[str] = (),
        file: Path | None = None,
    ) -> Recipe:
        """Check a recipe that is given as YAML text.

        Args:
            text: The YAML text.
            name: Name of the run in reports.
            origin: Name of the text in messages.
            overrides: Settings as ``stages.0.target.ratio=0.2``; values are YAML.
            file: The file with the text, which the output must not overwrite.

        Raises:
            RecipeError: The text has mistakes; the message lists all of them, a line each.
        """
        return checked(text, origin, overrides, partial(_build, cls, name, file, Frame))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, name: str = "recipe") -> Recipe:
        """Check a recipe that is given as Python data.

        Args:
            data: The keys of a recipe file. ``version`` may be left out, ``model`` too when a
                model is passed to `run`, and ``output`` when nothing is to be written. Stages,
                evaluators and exporters may be objects.
            name: Name of the run in reports and messages.

        Raises:
            RecipeError: The data has mistakes; the message lists all of them, a line each.
        """
        given = dict(data) if isinstance(data, Mapping) else data
        return checked_data(given, name, partial(_build, cls, name, None, in_memory(Frame)))


def _build(
    cls: type[Recipe],
    name: str,
    file: Path | None,
    keys: type[Frame],
    data: Any,
    problems: list[Problem],
) -> Recipe | None:
    if not isinstance(data, dict):
        problems.append(Problem((), "a recipe is a mapping with the keys version, model, …"))
        return None
    written_down = plain(data)
    frame = validated(keys, written_down, (), problems)
    # Lists are checked even when the frame has mistakes, so that one run reports all of them.
    stages = [
        Placed(place, stage)
        for index, entry in entries(data, "stages")
        if (stage := _stage(entry, place := ("stages", index), problems)) is not None
    ]
    measured: list[Placed[Evaluator]] = named_entries(evaluators, data, "evaluate", problems)
    written: list[Placed[Exporter]] = named_entries(exporters, data, "export", problems)
    _check_ratios(stages, problems)
    problems += refuse_twice(written)
    problems += _misplaced(stages, written)
    if frame is None:
        return None
    if frame.model is not None:
        check_surroundings(frame.model, problems)
        _check_layers(frame.model, stages, problems)
        check_calibration(frame.calibration, stages, problems)
        if frame.model.memory == "layerwise":
            problems += unstreamable((*stages, *measured, *written), frame.calibration)
    elif frame.calibration is not None:
        check_calibration(frame.calibration, (), problems)
    inputs = inputs_of(written_down, file)
    output = None
    if frame.output is not None:
        output = output_of(frame.output, inputs, problems)
    elif written:
        problems.append(Problem(("export",), "exports need a folder; add `output`"))
    if problems:
        return None
    return cls(
        name=name,
        model=frame.model,
        calibration=frame.calibration,
        stages=tuple(one.component for one in stages),
        evaluators=tuple(one.component for one in measured),
        exporters=tuple(one.component for one in written),
        output=output,
        seed=frame.seed,
        data=written_down,
        inputs=inputs,
    )


def _stage(entry: Any, place: Place, problems: list[Problem]) -> Stage | None:
    if isinstance(entry, Pruner | Recovery):
        return entry
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
    return pruner if checked_target(pruner, place, problems) else None


def _misplaced(
    stages: Sequence[Placed[Stage]], exporters: Sequence[Placed[Exporter]]
) -> Iterator[Problem]:
    """Check what follows a recovery that inserts operators between layers."""
    first = next(
        (
            number
            for number, stage in enumerate(stages)
            if isinstance(stage.component, Recovery) and stage.component.operators
        ),
        None,
    )
    if first is None:
        return
    name = stages[first].component.name
    for stage in stages[first + 1 :]:
        if isinstance(stage.component, Pruner) or stage.component.reference:
            yield Problem(
                stage.place,
                f"'{stage.component.name}' cannot follow '{name}', which inserts operators "
                f"between layers; move it before '{name}' or remove one",
            )
    for exporter in exporters:
        if not exporter.component.operators:
            yield Problem(
                exporter.place,
                f"'{exporter.component.name}' cannot store the operators that '{name}' inserts "
                "between layers; export `onnx`, or repair by `fold_linear` or `refit`",
            )


def _pruners(stages: Sequence[Placed[Stage]]) -> Iterator[Placed[Pruner]]:
    for stage in stages:
        if isinstance(stage.component, Pruner):
            yield Placed(stage.place, stage.component)


def _check_ratios(stages: Sequence[Placed[Stage]], problems: list[Problem]) -> None:
    targets = [pruner.component.target for pruner in _pruners(stages)]
    total = sum(t.ratio for t in targets if t.ratio is not None and t.of == "original")
    if total >= 1:
        problems.append(
            Problem(
                ("stages",),
                f"the ratios add up to {total:.0%} of the original model; nothing would remain",
            )
        )


def _check_layers(
    source: ModelSource, stages: Sequence[Placed[Stage]], problems: list[Problem]
) -> None:
    """Check that layers remain, where their number is known without loading the model."""
    layers = stored_layers(source.id)
    wanted = 0
    for pruner in _pruners(stages):
        wanted += pruner.component.target.layers_removed or 0
        if layers is not None and wanted >= layers:
            problems.append(
                Problem(
                    (*pruner.place, "target"),
                    f"the stages up to this one remove {wanted} layers; the model has {layers}, "
                    f"at most {layers - 1} can be removed",
                )
            )
            return
