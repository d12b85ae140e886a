"""Run a recipe from the model to the report: one loaded model, all stages in order."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_plugin.checks import refuse_targets
from slm_plugin.errors import UserError
from slm_plugin.export.base import ExportRecord
from slm_plugin.export.checkpoint import CheckpointExporter
from slm_plugin.models.bundled import BUNDLED
from slm_plugin.models.fingerprint import Fingerprint
from slm_plugin.models.loading import ModelSource
from slm_plugin.outputs.claim import Output, claim
from slm_plugin.outputs.place import Input, refuse_same
from slm_plugin.plans import PruningPlan
from slm_plugin.plans.losses import loss_change
from slm_plugin.preparation import InMemory, calibration_record, model_source, prepare
from slm_plugin.progress import say, timed
from slm_plugin.pruners.base import Pruner
from slm_plugin.recipe import Recipe, Stage
from slm_plugin.recovery.base import Recovery
from slm_plugin.report.record import RunReport, StageRecord, StateRecord
from slm_plugin.report.writer import write_report
from slm_plugin.result import RunResult
from slm_plugin.session import Session
from slm_plugin.versions import installed_versions, machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(slots=True)
class _Log:
    """The data that a run collects for the report."""

    source: ModelSource | InMemory
    started: float = field(default_factory=time.perf_counter)
    stages: list[StageRecord] = field(default_factory=list)
    states: list[StateRecord] = field(default_factory=list)
    plans: dict[str, PruningPlan] = field(default_factory=dict)


def run(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    *,
    overwrite: bool = False,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: object = None,
    stack: str | None = None,
) -> RunResult:
    """Run a recipe, from loading to the report.

    The output folder appears only when everything in it is written and verified. After a failure,
    finished plans and exports are kept in ``OUTPUT.incomplete``.

    Args:
        recipe: A recipe, its data (`Recipe.from_dict`), or the path of its YAML file.
        overwrite: Replace a former result once the new one is complete.
        model: A model in memory, in place of the recipe's; it is changed in place.
        tokenizer: The tokenizer of that model.
        calibration: Texts, token ids or batches for that model, in place of the recipe's source
            (`slm_plugin.calibration.given.token_ids`), or the tensors that an encoder reads
            (`slm_plugin.calibration.tensors.given_inputs`).
        stack: Which of that model's two stacks of layers, where it has two.

    Raises:
        RecipeError: The recipe has mistakes.
        UserError: The recipe names no model and none is passed.
        OutputError: The output folder exists or cannot be written.
        IncompleteError: A stage, an exporter or the report failed, and complete files were kept.
        SlmError: Any other failure.
    """
    recipe = Recipe.of(recipe)
    source = model_source(recipe.model, model, tokenizer, calibration, stack)
    log = _Log(source)
    if recipe.output is None:
        session = _loaded(recipe, source)
        start = session.fingerprint()
        _compute(recipe, session, log, None)
        return RunResult(_report(recipe, session, start, log, []), log.plans, None, session)
    with claim(recipe.output, "run", overwrite=overwrite, inputs=recipe.inputs) as output:
        session = _loaded(recipe, source)
        start = session.fingerprint()
        exports: list[ExportRecord] = []
        try:
            _compute(recipe, session, log, output.folder)
            _export(recipe, session, output, exports)
        except Exception:
            if log.plans:
                with output.part("the report", whole=True):
                    report = _report(recipe, session, start, log, exports)
                    write_report(report, log.plans, output.folder)
            raise
        report = _report(recipe, session, start, log, exports)
        with output.part("the report", whole=True):
            write_report(report, log.plans, output.folder)
    return RunResult(report, log.plans, recipe.output, session)


def _loaded(recipe: Recipe, source: ModelSource | InMemory) -> Session:
    """The session of a run, after all checks that depend on the model."""
    for evaluator in recipe.evaluators:
        evaluator.load()
    return _prepared(recipe, source)


def _compute(recipe: Recipe, session: Session, log: _Log, folder: Path | None) -> None:
    """Run all stages and measurements."""
    _measure(recipe, session, log, 0, "before")
    session.expect(_recoveries(recipe.stages))
    for number, stage in enumerate(recipe.stages, start=1):
        _stage(stage, number, session, log, folder)
        if number < len(recipe.stages):
            _measure(recipe, session, log, number, f"after {stage.name}")
    if recipe.stages:
        _measure(recipe, session, log, len(recipe.stages), "after")


def _export(recipe: Recipe, session: Session, output: Output, exports: list[ExportRecord]) -> None:
    """Write all exports; a failed one does not stop the others."""
    for exporter in recipe.exporters:
        with output.part(f"export {exporter.name}"), timed(f"export {exporter.name}"):
            exports.append(session.export(exporter, output.folder))


def plan(recipe: Recipe | Mapping[str, Any] | str | Path) -> dict[str, PruningPlan]:
    """Make the plans of a recipe, by file name, and write nothing.

    Plans of later stages depend on the model after the earlier ones, so all stages up to the last
    plan are applied in memory, including recoveries.

    Raises:
        RecipeError: The recipe has mistakes.
        SlmError: Any other failure.
    """
    return dict(_plans(Recipe.of(recipe)))


def write_plans(
    recipe: Recipe | Mapping[str, Any] | str | Path,
    folder: Path | None = None,
    *,
    overwrite: bool = False,
) -> dict[Path, PruningPlan]:
    """Make the plans of a recipe and write each when it is made.

    Args:
        recipe: A recipe, or the path of its YAML file.
        folder: Where; by default the recipe's output with ``.plans`` at its end.
        overwrite: Replace a former result.

    Returns:
        The plans by the files that hold them.

    Raises:
        RecipeError: The recipe has mistakes.
        OutputError: The folder exists, cannot be written, or overlaps the recipe's output.
        IncompleteError: A stage failed when plans of earlier ones were finished.
        SlmError: Any other failure.
    """
    recipe = Recipe.of(recipe)
    folder = folder or plans_folder(recipe)
    if recipe.output is not None:
        refuse_same(folder, recipe.output, "the recipe's output")
    plans = {}
    with claim(folder, "plan", overwrite=overwrite, inputs=recipe.inputs) as output:
        for name, made in _plans(recipe):
            made.write(output.folder / name)
            plans[folder / name] = made
    return plans


def plans_folder(recipe: Recipe) -> Path:
    """The default folder for the plans of a recipe.

    Raises:
        UserError: The recipe names no output.
    """
    if recipe.output is None:
        raise UserError("the recipe names no output", hint="name a folder for the plans")
    return recipe.output.with_name(f"{recipe.output.name}.plans")


def _plans(recipe: Recipe) -> Iterator[tuple[str, PruningPlan]]:
    """Plan all stages in order; a plan is applied when the next one is requested."""
    session = _prepared(recipe, model_source(recipe.model, None, None, None))
    last = max(
        (n for n, s in enumerate(recipe.stages, start=1) if isinstance(s, Pruner)), default=0
    )
    session.expect(_recoveries(recipe.stages[:last]))
    for number, stage in enumerate(recipe.stages[:last], start=1):
        if isinstance(stage, Pruner):
            with timed(f"stage {number}: plan {stage.name}"):
                made = session.plan(stage)
            yield _plan_name(number, stage), made
            _warn(made)
            if number < last:
                session.apply(made)
        else:
            session.recover(stage)


def apply_plan(
    plan: PruningPlan,
    source: ModelSource,
    output: Path,
    *,
    overwrite: bool = False,
    inputs: Iterable[Input] = (),
) -> Path:
    """Apply a plan to the model that it was made for, and write the checkpoint.

    Args:
        plan: The plan.
        source: The model.
        output: Folder that appears when everything in it is written and verified.
        overwrite: Replace a former result.
        inputs: Files that the output must not overwrite.

    Returns:
        The folder of the checkpoint.

    Raises:
        PlanError: The plan was made for another model.
        OutputError: The folder exists or cannot be written.
        SlmError: Any other failure.
    """
    with claim(output, "apply", overwrite=overwrite, inputs=inputs) as written:
        if source.stack is None and plan.before.stack:
            source = source.model_copy(update={"stack": plan.before.stack})
        session = prepare(source, trials=False)
        session.apply(plan)
        if plan.followed_by is not None:
            say(
                f"  warning: {plan.pruner} is followed by `recover: "
                f"{plan.followed_by.get('recover')}` in a recipe, which needs calibration data; "
                "a plan alone only removes"
            )
        record = session.export(CheckpointExporter(CheckpointExporter.Options()), written.folder)
        plan.write(written.folder / "plan.json")
    return output / record.folder


def _prepared(recipe: Recipe, source: ModelSource | InMemory) -> Session:
    return prepare(
        source,
        calibration=recipe.calibration,
        seed=recipe.seed,
        components=(*recipe.stages, *recipe.evaluators, *recipe.exporters),
        check_targets=lambda session: refuse_targets(recipe.stages, session.original),
    )


def _recoveries(stages: Sequence[Stage]) -> list[Recovery]:
    return [stage for stage in stages if isinstance(stage, Recovery)]


def _plan_name(number: int, stage: Pruner) -> str:
    return f"plan-{number:02d}-{stage.name}.json"


def _stage(stage: Stage, number: int, session: Session, log: _Log, folder: Path | None) -> None:
    started = time.perf_counter()
    if isinstance(stage, Pruner):
        with timed(f"stage {number}: {stage.name}, {stage.target.describe()}"):
            made = session.plan(stage)
            name = _plan_name(number, stage)
            if folder is not None:
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
        with timed(f"stage {number}: {stage.name}"):
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
    return ", ".join(filter(None, (_size_summary(made), loss_change(made))))


def _size_summary(made: PruningPlan) -> str:
    share = made.parameters_removed / made.before.parameters
    sizes = f"{made.before.parameters:,} to {made.after.parameters:,} parameters (-{share:.2%})"
    layers = f"{made.before.layers} to {made.after.layers} layers"
    if made.kind == "depth":
        return f"{layers}, {sizes}"
    parts = [layers] if made.kind == "hybrid" else []
    if made.before.experts != made.after.experts:
        experts = f"{made.before.experts} to {made.after.experts} experts in every layer"
        return ", ".join([*parts, experts, sizes])
    both = (made.before, made.after)
    named = {
        "hidden size": [f"{d.hidden_size:,}" for d in both],
        "MLP channels": [d.width_range for d in both],
        "query heads": [str(d.attention_heads) for d in both],
        "KV groups": [str(d.kv_heads) for d in both],
    }
    changed = [f"{name} {old} -> {new}" for name, (old, new) in named.items() if old != new]
    return ", ".join([*parts, *changed, sizes])


def _measure(recipe: Recipe, session: Session, log: _Log, stage: int, label: str) -> None:
    """Measure one state; between stages only with evaluators of ``every_stage``."""
    middle = 0 < stage < len(recipe.stages)
    chosen = [e for e in recipe.evaluators if e.options.every_stage or not middle]
    if not chosen:
        return
    # A capture would count as the model's memory, and the next stage needs a new one.
    session.release()
    measured = []
    for evaluator in chosen:
        with timed(f"measure {label}: {evaluator.name}"):
            measured += session.measure(evaluator)
    log.states.append(StateRecord(stage=stage, label=label, measurements=tuple(measured)))


def _report(
    recipe: Recipe, session: Session, source: Fingerprint, log: _Log, exports: list[ExportRecord]
) -> RunReport:
    bundled = None if isinstance(log.source, InMemory) else BUNDLED.get(log.source.id)
    return RunReport(
        title=recipe.name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        recipe=dict(recipe.data),
        versions=installed_versions(),
        machine=machine(),
        seed=recipe.seed,
        model=session.source,
        license=bundled.license if bundled else None,
        calibration=calibration_record(log.source, recipe.calibration, session),
        input=source,
        output=session.fingerprint(),
        before=session.original,
        after=session.view.dimensions(),
        stages=tuple(log.stages),
        states=tuple(log.states),
        exports=tuple(exports),
        seconds=time.perf_counter() - log.started,
    )
