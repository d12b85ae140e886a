"""Carry out one comparison: every method, target and recovery on one loaded model."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_plugin.calibration.samples import digest
from slm_plugin.comparison.cache import Kept, is_cell, is_plan
from slm_plugin.comparison.configuration import Comparison, Method, named
from slm_plugin.comparison.cost import effort_of
from slm_plugin.comparison.page import write_comparison
from slm_plugin.comparison.record import Cell, ComparisonReport, Effort, Planned
from slm_plugin.errors import OutputError, SlmError, TargetError, UserError
from slm_plugin.evaluation.base import Evaluator, Measurement
from slm_plugin.lazy import torch
from slm_plugin.models.bundled import cache_folder
from slm_plugin.models.loading import ModelSource
from slm_plugin.outputs.claim import claim
from slm_plugin.plans import PruningPlan
from slm_plugin.preparation import InMemory, calibration_record, model_source, prepare
from slm_plugin.progress import say
from slm_plugin.pruners.base import Pruner
from slm_plugin.recovery.base import Recovery
from slm_plugin.session import Session
from slm_plugin.target import Target
from slm_plugin.versions import installed_versions, machine

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_NOT_MEASURED = "not measured yet"


@dataclass(frozen=True, slots=True)
class _Run:
    """What all cells share: the model that none of them changes, and what is kept of them.

    Attributes:
        known: Only look up what is kept; plan and measure nothing.
    """

    comparison: Comparison
    pristine: Session
    kept: Kept
    known: bool

    @property
    def measuring(self) -> list[Any]:
        """What the figures of a cell depend on beside the model."""
        return [[e.name, e.options.model_dump(mode="json")] for e in self.comparison.evaluators]


def compare(
    comparison: Comparison | str | Path,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    known: bool = False,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: object = None,
) -> ComparisonReport:
    """Prune one loaded model by many methods, measure every result, write table and page.

    Finished cells are kept in the cache folder, so that a comparison that was killed goes on where
    it stopped. The output folder appears when everything in it is written, or not at all.

    Args:
        comparison: A comparison, or the path of its YAML file.
        overwrite: Replace an output folder that exists; it stays until the new one is whole.
        fresh: Take nothing from earlier comparisons, nor trials of earlier searches: what is timed
            is done.
        known: Write what earlier comparisons finished and say of every other row that it is not
            measured; not together with ``fresh``.
        model: A model in memory, in place of the comparison's; it stays as it is.
        tokenizer: The tokenizer of that model.
        calibration: Texts, token ids or batches for that model, in place of the comparison's
            source (`slm_plugin.calibration.given.token_ids`).

    Raises:
        RecipeError: The comparison has mistakes.
        UserError: ``fresh`` and ``known`` are both set, or there is no model.
        TargetError: Methods cannot reach their targets; a line each.
        OutputError: The output folder exists or cannot be written.
        SlmError: The dense model cannot be loaded or measured. What fails in one cell is told in
            its row, and the others go on.
    """
    if fresh and known:
        raise UserError("--fresh forgets what --known shows", hint="leave one of them out")
    if not isinstance(comparison, Comparison):
        comparison = Comparison.read(comparison)
    source = model_source(comparison.model, model, tokenizer, calibration)
    if comparison.output is None:
        return _compared(comparison, source, fresh=fresh, known=known)
    with claim(
        comparison.output, "compare", overwrite=overwrite, inputs=comparison.inputs
    ) as output:
        report = _compared(comparison, source, fresh=fresh, known=known)
        write_comparison(report, output.folder)
    return report


def _compared(
    comparison: Comparison, source: ModelSource | InMemory, *, fresh: bool, known: bool
) -> ComparisonReport:
    """Load the model and fill all cells."""
    started = time.perf_counter()
    for evaluator in comparison.evaluators if not known else ():
        evaluator.load()
    pristine = prepare(
        source,
        calibration=comparison.calibration,
        seed=comparison.seed,
        components=tuple(_components(comparison)),
        check_targets=lambda session: _check_targets(comparison, session),
        trials=not (fresh or known),
    )
    kept = Kept(cache_folder() / "cells", _facts(pristine), fresh=fresh)
    cells = tuple(_cells(_Run(comparison, pristine, kept, known)))
    return ComparisonReport(
        title=comparison.name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        comparison=dict(comparison.data),
        versions=installed_versions(),
        machine=machine(),
        seed=comparison.seed,
        model=pristine.source,
        calibration=calibration_record(source, comparison.calibration, pristine),
        fingerprint=pristine.fingerprint(),
        cells=cells,
        seconds=time.perf_counter() - started,
    )


def _components(comparison: Comparison) -> Iterator[Any]:
    """Everything that the comparison uses; a strategy's target is any of them."""
    for method in comparison.methods:
        yield method.at(comparison.targets[0])
        yield from (recovery for recovery in method.recoveries if recovery is not None)
    yield from comparison.evaluators


def _check_targets(comparison: Comparison, session: Session) -> None:
    """Refuse all that is out of reach at once.

    Raises:
        TargetError: With a line for every method and target.
    """
    lines = []
    for index, method in enumerate(comparison.methods):
        for number, target in enumerate(comparison.targets):
            try:
                method.at(target).check_target(session.original, session.original)
            except TargetError as error:
                lines.append(f"methods.{index} ({method.label}), targets.{number}: {error}")
    if lines:
        raise TargetError("\n".join(lines))


def _facts(pristine: Session) -> dict[str, Any]:
    tokens = pristine.calibration
    return {
        "versions": installed_versions(),
        "machine": machine(),
        "device": str(pristine.model.device),
        "model": pristine.fingerprint().model_dump(),
        "calibration": None if tokens is None else digest(tokens),
        "seed": pristine.seed,
    }


def _cells(run: _Run) -> Iterator[Cell]:
    """The dense model, and every method at every target with every recovery."""
    comparison = run.comparison
    yield _dense(run)
    total = len(comparison.methods) * len(comparison.targets)
    number = 0
    for target in comparison.targets:
        for method in comparison.methods:
            number += 1
            say(f"[{number}/{total}] {method.label}, {target.describe()} …")
            yield from _method(run, method, target)


def _dense(run: _Run) -> Cell:
    facts = {"evaluators": run.measuring}
    blank = Cell(label="dense", after=run.pristine.original)
    known = run.kept.find(Cell, facts, partial(is_cell, blank=blank))
    if known is not None:
        return known
    if run.known:
        return blank.model_copy(update={"error": _NOT_MEASURED})
    say("the dense model …")
    # Measured on a copy as all others are, so that a peak of the process counts the same models.
    session = _copy(run.pristine)
    cell = Cell(label="dense", after=session.original)
    cell = cell.model_copy(update={"measured": _measure(run.comparison.evaluators, session, {})})
    run.kept.keep(cell, facts)
    return cell


def _method(run: _Run, method: Method, target: Target) -> Iterator[Cell]:
    """A cell for every recovery; they share one plan, which is made when the first needs it."""
    facts: dict[str, Any] = {
        "method": method.strategy.name,
        "options": method.options.model_dump(mode="json"),
        "target": target.model_dump(mode="json"),
    }
    planned: Planned | SlmError | None = None
    for recovery in method.recoveries:
        named_by = _naming(recovery)
        cell_facts = {**facts, **named_by, "evaluators": run.measuring}
        blank = Cell(label=method.label, **{**facts, "target": target}, **named_by)
        known = run.kept.find(Cell, cell_facts, partial(is_cell, blank=blank))
        if known is not None:
            say("  known")
            yield known.model_copy(update={"label": method.label})
            continue
        if run.known:
            yield blank.model_copy(update={"error": _NOT_MEASURED})
            continue
        if planned is None:
            planned = _planned(run, method.at(target), facts)
        if isinstance(planned, SlmError):
            yield blank.model_copy(update={"error": _one_line(planned)})
            continue
        cell = _cell(run, blank, planned, recovery)
        if cell.error:
            say(f"  {cell.error}")
        else:
            run.kept.keep(cell, cell_facts)
        yield cell


def _naming(recovery: Recovery | None) -> dict[str, Any]:
    """The fields of a cell that say which recovery it has."""
    if recovery is None:
        return {}
    return {
        "recovery": recovery.name,
        "recovery_options": recovery.options.model_dump(mode="json"),
        "recovered": named(recovery.name, recovery.options),
    }


def _planned(run: _Run, pruner: Pruner, facts: dict[str, Any]) -> Planned | SlmError:
    """The plan of a strategy for the pristine model, or why there is none.

    Raises:
        ContractError: The strategy changed the model. All other cells are copies of it, so the
            comparison ends; those that are finished are kept.
    """
    fits = partial(is_plan, facts=facts, pristine=run.pristine)
    known = run.kept.find(Planned, facts, fits)
    if known is not None:
        return known
    _seed(run.pristine.seed)
    if pruner.needs_calibration:
        # One pass over the calibration set serves all strategies: it is no part of their time.
        run.pristine.captured()
    try:
        plan, effort = effort_of(run.pristine, lambda: run.pristine.plan(pruner))
    except OutputError:
        raise
    except SlmError as error:
        if run.pristine.spoiled:
            raise
        say(f"  {_one_line(error)}")
        return error
    planned = Planned(plan=plan, effort=effort)
    if fits(planned):
        run.kept.keep(planned, facts)
    return planned


def _cell(run: _Run, blank: Cell, planned: Planned, recovery: Recovery | None) -> Cell:
    """Prune a copy, repair it if asked to, and measure it; a failure is told in the cell."""
    found: dict[str, Any] = {"planning": planned.effort, "warnings": planned.plan.warnings}
    measured: dict[str, tuple[Measurement, ...]] = {}
    try:
        session, found["recovering"] = _pruned(run.pristine, planned.plan, recovery)
        found["after"] = session.view.dimensions()
        _measure(run.comparison.evaluators, session, measured)
    except OutputError:
        raise
    except SlmError as error:
        found["error"] = _one_line(error)
    return blank.model_copy(update={**found, "measured": measured})


def _pruned(
    pristine: Session, plan: PruningPlan, recovery: Recovery | None
) -> tuple[Session, Effort | None]:
    """A session of its own for a cell, its model pruned and repaired; what the repair took."""
    session = _copy(pristine)
    if recovery is not None and recovery.reference:
        pristine.keep_reference()
        session.reference = pristine.reference
    session.apply(plan)
    if recovery is None:
        return session, None
    _seed(session.seed)
    _, effort = effort_of(session, lambda: session.recover(recovery))
    return session, effort


def _copy(pristine: Session) -> Session:
    """A session on a copy of the model, with a tokenizer and a calibration set of its own.

    A copy in memory costs the room of one more model, but no second reading, and unlike weights
    put back it cannot leave behind what surgery did to shapes or to the configuration. What a
    component does to it that it may not stays in its cell.
    """
    tokens = pristine.calibration
    return Session(
        copy.deepcopy(pristine.model),
        copy.deepcopy(pristine.tokenizer),
        None if tokens is None else tokens.clone(),
        source=pristine.source,
        seed=pristine.seed,
        journals=pristine.journals,
    )


def _measure(
    evaluators: Sequence[Evaluator],
    session: Session,
    measured: dict[str, tuple[Measurement, ...]],
) -> dict[str, tuple[Measurement, ...]]:
    """Add all figures to ``measured``, by evaluator; they stay there when a later one fails."""
    session.release()
    for evaluator in evaluators:
        taken = tuple(session.measure(evaluator))
        measured[evaluator.name] = (*measured.get(evaluator.name, ()), *taken)
    return measured


def _one_line(error: SlmError) -> str:
    return " ".join(str(error).split())


def _seed(seed: int) -> None:
    """Before every piece of work alike: no cell depends on those before it."""
    random.seed(seed)
    torch.manual_seed(seed)
