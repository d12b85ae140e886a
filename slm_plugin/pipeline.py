"""Follow a recipe from the model to the report: one loaded model, stage after stage."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from slm_plugin.calibration.samples import CalibrationRecord, draw
from slm_plugin.checks import refuse_targets
from slm_plugin.errors import CalibrationError, ModelSourceError
from slm_plugin.export.base import ExportRecord
from slm_plugin.models.bundled import BUNDLED, cache_folder, trials_folder
from slm_plugin.models.fingerprint import Fingerprint
from slm_plugin.models.loading import load
from slm_plugin.models.streaming import is_streamed
from slm_plugin.outputs.claim import Output, claim
from slm_plugin.outputs.place import refuse_same
from slm_plugin.progress import say
from slm_plugin.pruners.base import Pruner
from slm_plugin.pruners.plan import PruningPlan
from slm_plugin.recipe import Recipe, Stage
from slm_plugin.recovery.base import Recovery
from slm_plugin.report.record import RunReport, StageRecord, StateRecord
from slm_plugin.report.writer import write_report
from slm_plugin.session import Session
from slm_plugin.versions import installed_versions, machine


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run leaves: the report, the plans by file name, and the output folder."""

    report: RunReport
    plans: dict[str, PruningPlan]
    output: Path


@dataclass(slots=True)
class _Log:
    """What a run notes down on its way to the report."""

    started: float = field(default_factory=time.perf_counter)
    stages: list[StageRecord] = field(default_factory=list)
    states: list[StateRecord] = field(default_factory=list)
    plans: dict[str, PruningPlan] = field(default_factory=dict)


def run(recipe: Recipe | str | Path, *, overwrite: bool = False) -> RunResult:
    """Carry a recipe out, from loading to the report.

    The output folder appears when everything in it is written and verified, or not at all. When
    something fails on the way, finished plans and exports are kept in ``OUTPUT.incomplete``.

    Args:
        recipe: A recipe, or the path of its YAML file.
        overwrite: Replace a former result; it stays until the new one is whole.

    Raises:
        RecipeError: The recipe has mistakes.
        OutputError: The output folder exists or cannot be written.
        IncompleteError: A stage, an exporter or the report failed, and there was something to keep.
        SlmError: Anything else that goes wrong, said in one sentence.
    """
    recipe = _checked(recipe)
    log = _Log()
    with claim(recipe.output, "run", overwrite=overwrite, inputs=recipe.inputs) as output:
        for evaluator in recipe.evaluators:
            evaluator.load()
        session = prepare(recipe)
        source = session.fingerprint()
        exports: list[ExportRecord] = []
        try:
            _compute(recipe, session, log, output.folder)
            _export(recipe, session, output, exports)
        except Exception:
            if log.plans:
                with output.part("the report", whole=True):
                    report = _report(recipe, session, source, log, exports)
                    write_report(report, log.plans, output.folder)
            raise
        report = _report(recipe, session, source, log, exports)
        with output.part("the report", whole=True):
            write_report(report, log.plans, output.folder)
    return RunResult(report, log.plans, recipe.output)


def _compute(recipe: Recipe, session: Session, log: _Log, folder: Path) -> None:
    """Go through all stages and measurements."""
    _measure(recipe, session, log, 0, "before")
    _keep_reference(recipe.stages, session)
    for number, stage in enumerate(recipe.stages, start=1):
        _stage(stage, number, session, log, folder)
        if number < len(recipe.stages):
            _measure(recipe, session, log, number, f"after {stage.name}")
    if recipe.stages:
        _measure(recipe, session, log, len(recipe.stages), "after")


def _export(recipe: Recipe, session: Session, output: Output, exports: list[ExportRecord]) -> None:
    """Write all exports; the failure of one does not keep back the others."""
    for exporter in recipe.exporters:
        with output.part(f"export {exporter.name}"), _timed(f"export {exporter.name}"):
            exports.append(session.export(exporter, output.folder))


def plan(recipe: Recipe | str | Path) -> dict[str, PruningPlan]:
    """Make the plans of a recipe, by file name, and write nothing.

    Plans of later stages are for the model that the earlier ones leave, so those are carried out in
    memory, recoveries too, up to the last plan.

    Raises:
        RecipeError: The recipe has mistakes.
        SlmError: Anything else that goes wrong, said in one sentence.
    """
    return dict(_plans(_checked(recipe)))


def write_plans(
    recipe: Recipe | str | Path, folder: Path | None = None, *, overwrite: bool = False
) -> dict[Path, PruningPlan]:
    """Make the plans of a recipe and write them, each as soon as it is made.

    Args:
        recipe: A recipe, or the path of its YAML file.
        folder: Where; by default the recipe's output with ``.plans`` at its end.
        overwrite: Replace a former result.

    Returns:
        The plans by the files that hold them.

    Raises:
        RecipeError: The recipe has mistakes.
        OutputError: The folder exists or cannot be written, or has to do with the recipe's output.
        IncompleteError: A stage failed when plans of earlier ones were finished.
        SlmError: Anything else that goes wrong, said in one sentence.
    """
    recipe = _checked(recipe)
    folder = folder or plans_folder(recipe)
    refuse_same(folder, recipe.output, "the recipe's output")
    plans = {}
    with claim(folder, "plan", overwrite=overwrite, inputs=recipe.inputs) as output:
        for name, made in _plans(recipe):
            made.write(output.folder / name)
            plans[folder / name] = made
    return plans


def plans_folder(recipe: Recipe) -> Path:
    """Where the plans of a recipe go when nothing else is said."""
    return recipe.output.with_name(f"{recipe.output.name}.plans")


def _plans(recipe: Recipe) -> Iterator[tuple[str, PruningPlan]]:
    """Plan stage after stage; a plan is carried out when the next one is asked for."""
    session = prepare(recipe)
    last = max(
        (n for n, s in enumerate(recipe.stages, start=1) if isinstance(s, Pruner)), default=0
    )
    _keep_reference(recipe.stages[:last], session)
    for number, stage in enumerate(recipe.stages[:last], start=1):
        if isinstance(stage, Pruner):
            with _timed(f"stage {number}: plan {stage.name}"):
                made = session.plan(stage)
            yield _plan_name(number, stage), made
            _warn(made)
            if number < last:
                session.apply(made)
        else:
            session.recover(stage)


def prepare(recipe: Recipe) -> Session:
    """Load the model, draw the calibration set and refuse targets that are out of reach.

    Raises:
        SlmError: The model or the calibration set cannot be had, or a target cannot be reached.
    """
    random.seed(recipe.seed)
    torch.manual_seed(recipe.seed)
    # Where a search would fail to write its journal later, nothing is loaded.
    wanted = any(isinstance(stage, Pruner) and stage.keeps_trials for stage in recipe.stages)
    journals = trials_folder() if wanted else cache_folder() / "trials"
    with _timed(f"load {recipe.model.id}"):
        model, tokenizer = load(recipe.model)
    session = Session(
        model,
        tokenizer,
        source=recipe.model.id,
        seed=recipe.seed,
        journals=journals,
    )
    refuse_unstreamable((*recipe.stages, *recipe.evaluators, *recipe.exporters), session)
    refuse_targets(recipe.stages, session.original)
    for evaluator in recipe.evaluators:
        evaluator.fit(session)
    for exporter in recipe.exporters:
        exporter.check_model(session)
    if recipe.calibration is not None:
        with _timed(f"calibration from {recipe.calibration.source}"):
            session.calibration = draw(recipe.calibration, model, tokenizer, recipe.seed)
    refuse_few_samples((s for s in recipe.stages if isinstance(s, Recovery)), session)
    return session


def _keep_reference(stages: Sequence[Stage], session: Session) -> None:
    if any(isinstance(stage, Recovery) and stage.reference for stage in stages):
        session.keep_reference()


def refuse_unstreamable(components: Iterable[Any], session: Session) -> None:
    """A model that turned out larger than the GPU is streamed, though no recipe asked for it.

    Raises:
        ModelSourceError: A component needs the whole model.
    """
    if not is_streamed(session.model):
        return
    for component in components:
        if not component.streams:
            raise ModelSourceError(
                f"{session.source} is larger than the GPU, and '{component.name}' needs it whole",
                hint=f"set `device: cpu`, or leave '{component.name}' out",
            )


def refuse_few_samples(recoveries: Iterable[Recovery], session: Session) -> None:
    """A calibration set that is too small for a recovery is told before anything is done.

    Raises:
        CalibrationError: It is.
    """
    if session.calibration is None:
        return
    samples = len(session.calibration)
    for recovery in recoveries:
        if samples < recovery.fewest_samples:
            raise CalibrationError(
                f"'{recovery.name}' needs {recovery.fewest_samples} calibration samples or more; "
                f"the set has {samples}",
                hint="raise `samples`",
            )


def _checked(recipe: Recipe | str | Path) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else Recipe.read(recipe)


def _plan_name(number: int, stage: Pruner) -> str:
    return f"plan-{number:02d}-{stage.name}.json"


def _stage(stage: Stage, number: int, session: Session, log: _Log, folder: Path) -> None:
    started = time.perf_counter()
    if isinstance(stage, Pruner):
        with _timed(f"stage {number}: {stage.name}, {stage.target.describe()}"):
            made = session.plan(stage)
            name = _plan_name(number, stage)
            made.write(folder / name)
            session.apply(made)
        log.plans[name] = made
        record = StageRecord(
            number=number,
            kind=made.kind,
            name=stage.name,
            summary=_summary(made),
            seconds=time.perf_counter() - started,
            after=made.after,
            plan=name,
            warnings=made.warnings,
        )
        say(f"  {record.summary}")
        _warn(made)
    else:
        with _timed(f"stage {number}: {stage.name}"):
            recovery = session.recover(stage)
        record = StageRecord(
            number=number,
            kind="recovery",
            name=stage.name,
            summary="; ".join(recovery.notes) or "weights changed, shapes kept",
            seconds=time.perf_counter() - started,
            after=session.view.dimensions(),
            recovery=recovery,
        )
    log.stages.append(record)


def _warn(made: PruningPlan) -> None:
    for warning in made.warnings:
        say(f"  warning: {warning}")


def _summary(made: PruningPlan) -> str:
    share = made.parameters_removed / made.before.parameters
    sizes = f"{made.before.parameters:,} to {made.after.parameters:,} parameters (-{share:.2%})"
    if made.kind == "depth":
        return f"{made.before.layers} to {made.after.layers} layers, {sizes}"
    return (
        f"MLP width {made.before.intermediate_size} to {made.after.intermediate_size}, "
        f"KV groups {made.before.kv_heads} to {made.after.kv_heads}, {sizes}"
    )


def _measure(recipe: Recipe, session: Session, log: _Log, stage: int, label: str) -> None:
    """Measure one state; in the middle of the recipe only what asks for every stage."""
    middle = 0 < stage < len(recipe.stages)
    chosen = [e for e in recipe.evaluators if e.options.every_stage or not middle]
    if not chosen:
        return
    # A held capture would count as the model's memory, and the next stage needs a fresh one.
    session.release()
    measured = []
    for evaluator in chosen:
        with _timed(f"measure {label}: {evaluator.name}"):
            measured += session.measure(evaluator)
    log.states.append(StateRecord(stage=stage, label=label, measurements=tuple(measured)))


def _report(
    recipe: Recipe, session: Session, source: Fingerprint, log: _Log, exports: list[ExportRecord]
) -> RunReport:
    calibration = None
    if recipe.calibration is not None and session.calibration is not None:
        calibration = CalibrationRecord.of(recipe.calibration, session.calibration, recipe.seed)
    bundled = BUNDLED.get(recipe.model.id)
    return RunReport(
        title=recipe.name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        recipe=dict(recipe.data),
        versions=installed_versions(),
        machine=machine(),
        seed=recipe.seed,
        model=recipe.model.id,
        license=bundled.license if bundled else None,
        calibration=calibration,
        input=source,
        output=session.fingerprint(),
        before=session.original,
        after=session.view.dimensions(),
        stages=tuple(log.stages),
        states=tuple(log.states),
        exports=tuple(exports),
        seconds=time.perf_counter() - log.started,
    )


@contextmanager
def _timed(label: str) -> Iterator[None]:
    started = time.perf_counter()
    say(f"{label} …")
    yield
    say(f"  {time.perf_counter() - started:.1f} s")
