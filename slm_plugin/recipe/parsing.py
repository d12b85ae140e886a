"""A recipe: one compression run, checked completely before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from slm_plugin.evaluation.base import Evaluator
from slm_plugin.export.base import Exporter
from slm_plugin.pruners.base import Pruner
from slm_plugin.recipe.checked_file import CheckedFile
from slm_plugin.recipe.checking import known_class, unstreamable, validated
from slm_plugin.recipe.inputs import refuse_twice
from slm_plugin.recipe.mistakes import Mistakes, Placed, Problem
from slm_plugin.recipe.operators import misplaced
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
from slm_plugin.registry import evaluators, exporters, nearest, pruners, recoveries
from slm_plugin.target import Target

Stage = Pruner | Recovery


class Frame(Common):
    """The keys at the top of a recipe; the entries of its lists are checked one by one."""

    stages: Annotated[
        tuple[Any, ...], Field(description="what to do, in order: prune or recover")
    ] = ()
    export: Annotated[tuple[Any, ...], Field(description="what to write")] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe(CheckedFile):
    """A checked recipe with its components created.

    Attributes:
        stages: What is done, in order.
        exporters: What is written.
    """

    kind: ClassVar[str] = "recipe"
    told_by: ClassVar = ("stages", "methods", "compare")
    first_keys: ClassVar[str] = "version, model"
    frame: ClassVar[type[Common]] = Frame

    stages: tuple[Stage, ...]
    exporters: tuple[Exporter, ...]

    @classmethod
    def _own_fields(
        cls, frame: Any | None, data: dict[str, Any], mistakes: Mistakes
    ) -> dict[str, Any]:
        stages = [
            Placed(place, stage)
            for index, entry in entries(data, "stages")
            if (stage := _stage(entry, mistakes.below(*(place := ("stages", index))))) is not None
        ]
        measured: list[Placed[Evaluator]] = named_entries(evaluators, data, "evaluate", mistakes)
        written: list[Placed[Exporter]] = named_entries(exporters, data, "export", mistakes)
        _check_ratios(stages, mistakes)
        mistakes.extend(refuse_twice(written))
        mistakes.extend(misplaced(stages, written))
        mistakes.extend(_on_uneven(stages))
        if frame is not None:
            _check_frame(frame, stages, measured, written, mistakes)
        return {
            "stages": tuple(_with_recoveries(stages, mistakes)),
            "evaluators": tuple(one.component for one in measured),
            "exporters": tuple(one.component for one in written),
        }


def _check_frame(
    frame: Any,
    stages: Sequence[Placed[Stage]],
    measured: Sequence[Placed[Evaluator]],
    written: Sequence[Placed[Exporter]],
    mistakes: Mistakes,
) -> None:
    """Check the components against the model, the calibration source and the output."""
    if frame.model is not None:
        check_surroundings(frame.model, mistakes)
        config = stored_config(frame.model.id)
        family = None
        with mistakes.caught("model", "stack"):
            family = stored_family(config, frame.model.stack)
        _check_layers(stored_layers(config, family), stages, mistakes)
        mistakes.extend(unsuited(config, family, (*stages, *measured, *written)))
        check_calibration(frame.calibration, stages, mistakes, family)
        if frame.model.memory == "layerwise":
            mistakes.extend(unstreamable((*stages, *measured, *written), frame.calibration))
    elif frame.calibration is not None:
        check_calibration(frame.calibration, (), mistakes)
    if frame.output is None and written:
        mistakes.add("exports need a folder; add `output`", "export")


def _stage(entry: Any, mistakes: Mistakes) -> Stage | None:
    if isinstance(entry, Pruner | Recovery):
        return entry
    if not isinstance(entry, dict):
        mistakes.add("a stage is a mapping that begins with prune: or recover:")
        return None
    verbs = [verb for verb in ("prune", "recover") if verb in entry]
    if len(verbs) != 1:
        guess = next((nearest(str(k), ["prune", "recover"]) for k in entry), None)
        hint = f"; did you mean '{guess}:'?" if guess and not verbs else ""
        mistakes.add(f"a stage has exactly one of prune: and recover:{hint}")
        return None
    verb = verbs[0]
    rest = {key: value for key, value in entry.items() if key != verb}
    if verb == "recover":
        recovery: Recovery | None = component(recoveries, entry[verb], rest, mistakes, verb)
        return recovery
    before = len(mistakes.found)
    target = None
    if "target" not in rest:
        mistakes.add("the key 'target' is missing, as in `target: {ratio: 0.2}`")
    else:
        target = validated(Target, rest.pop("target"), mistakes.below("target"))
    found = known_class(pruners, entry[verb], mistakes.below(verb))
    if found is None:
        return None
    options = validated(found.Options, rest, mistakes)
    if target is not None and target.kind not in found.targets:
        known = ", ".join(found.targets)
        mistakes.add(
            f"{entry[verb]} takes no target of kind '{target.kind}'; it takes: {known}",
            "target",
            target.kind,
        )
    if options is None or target is None or len(mistakes.found) > before:
        return None
    pruner: Pruner = found(options, target)
    with mistakes.caught("target", target.kind):
        pruner.check()
        return pruner
    return None


def _with_recoveries(stages: Sequence[Placed[Stage]], mistakes: Mistakes) -> Iterator[Stage]:
    """The stages, each strategy with the recovery that belongs to it."""
    own: Recovery | None = None
    for stage in stages:
        here = stage.component
        yield from in_turn(own, here if isinstance(here, Recovery) else None)
        own = None
        if isinstance(here, Pruner):
            yield here
            own = following(here, mistakes.at(stage.place))
    yield from in_turn(own, None)


def _on_uneven(stages: Sequence[Placed[Stage]]) -> Iterator[Problem]:
    """Check what follows a stage that leaves layers of different widths."""
    before: Pruner | None = None
    for stage in _pruners(stages):
        pruner = stage.component
        if before is not None and not pruner.on_uneven:
            yield Problem(
                stage.place,
                f"'{pruner.name}' needs layers of one width and cannot follow '{before.name}' with "
                "an `allocation`; move it before that stage",
            )
        if before is None and pruner.leaves_uneven:
            before = pruner


def _pruners(stages: Sequence[Placed[Stage]]) -> Iterator[Placed[Pruner]]:
    for stage in stages:
        if isinstance(stage.component, Pruner):
            yield Placed(stage.place, stage.component)


def _check_ratios(stages: Sequence[Placed[Stage]], mistakes: Mistakes) -> None:
    targets = [pruner.component.target for pruner in _pruners(stages)]
    total = sum(t.ratio for t in targets if t.ratio is not None and t.of == "original")
    if total >= 1:
        mistakes.add(
            f"the ratios add up to {total:.0%} of the original model; nothing would remain",
            "stages",
        )


def _check_layers(layers: int | None, stages: Sequence[Placed[Stage]], mistakes: Mistakes) -> None:
    """Check that layers remain, where their number is known without loading the model."""
    wanted = 0
    for pruner in _pruners(stages):
        wanted += pruner.component.target.layers_removed or 0
        if layers is not None and wanted >= layers:
            mistakes.at(pruner.place).add(
                f"the stages up to this one remove {wanted} layers; the model has {layers}, "
                f"at most {layers - 1} can be removed",
                "target",
            )
            return
