"""Run one comparison: every method, target and recovery on one loaded model."""

from __future__ import annotations

import copy
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_plugin.calibration.samples import digest
from slm_plugin.comparison.cache import CellCache, is_cell, is_plan
from slm_plugin.comparison.configuration import ONLY_DECODERS, Comparison, Method, named
from slm_plugin.comparison.cost import measure_cost
from slm_plugin.comparison.page import write_comparison
from slm_plugin.comparison.record import Cell, ComparisonReport, Cost, Planned
from slm_plugin.errors import (
    OutputError,
    SlmError,
    TargetError,
    UnsupportedModelError,
    UserError,
)
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
    """What all cells share: the dense model, which no cell changes, and the cache.

    Attributes:
        known: Only read the cache; plan and measure nothing.
    """

    comparison: Comparison
    dense: Session
    cache: CellCache
    known: bool

    @property
    def measuring(self) -> list[Any]:
        """The evaluators and their options, on which the figures of a cell depend."""
        return [[e.name, e.options.model_dump(mode="json")] for e in self.comparison.evaluators]


def compare(
    comparison: Comparison | Mapping[str, Any] | str | Path,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    known: bool = False,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    calibration: object = None,
) -> ComparisonReport:
    """Prune one loaded model by many methods, measure every result, write table and page.

    Finished cells are stored in the cache folder, so that an interrupted comparison resumes. The
    output folder appears only when it is complete.

    Args:
        comparison: A comparison, its data (`Comparison.from_dict`), or the path of its YAML file.
        overwrite: Replace an existing output folder once the new one is complete.
        fresh: Ignore cached cells and the trials of earlier searches, so that all times are
            measured.
        known: Write the cached cells and mark every other row as not measured; excludes
            ``fresh``.
        model: A model in memory, in place of the comparison's; it is not changed.
        tokenizer: The tokenizer of that model.
        calibration: Texts, token ids or batches for that model, in place of the comparison's
            source (`slm_plugin.calibration.given.token_ids`).

    Raises:
        RecipeError: The comparison has mistakes.
        UserError: ``fresh`` and ``known`` are both set, or there is no model.
        TargetError: Methods cannot reach their targets; a line each.
        OutputError: The output folder exists or cannot be written.
        SlmError: The dense model cannot be loaded or measured. A failure in one cell is reported in
            its row, and the others continue.
    """
    if fresh and known:
        raise UserError("--fresh and --known exclude each other", hint="remove one of them")
    comparison = Comparison.of(comparison)
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
    dense = prepare(
        source,
        calibration=comparison.calibration,
        seed=comparison.seed,
        components=tuple(_components(comparison)),
        check_targets=lambda session: _check_targets(comparison, session),
        trials=not (fresh or known),
    )
    if dense.view.family.by_tensors:
        raise UnsupportedModelError(
            f"{ONLY_DECODERS}, and {dense.original.architecture} is none",
            hint="prune it by each strategy in turn: slm_plugin.prune, or a recipe",
        )
    cache = CellCache.of(cache_folder() / "cells", _facts(dense), fresh=fresh, known=known)
    cells = tuple(_cells(_Run(comparison, dense, cache, known)))
    return ComparisonReport(
        title=comparison.name,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        comparison=dict(comparison.data),
        versions=installed_versions(),
        machine=machine(),
        seed=comparison.seed,
        model=dense.source,
        calibration=calibration_record(source, comparison.calibration, dense),
        fingerprint=dense.fingerprint(),
        cells=cells,
        seconds=time.perf_counter() - started,
    )


def _components(comparison: Comparison) -> Iterator[Any]:
    """All components of the comparison; strategies have the first target."""
    for method in comparison.methods:
        yield method.at(comparison.targets[0])
        yield from _present(method.restoration, *method.recoveries)
    yield from comparison.evaluators


def _check_targets(comparison: Comparison, session: Session) -> None:
    """Report all unreachable targets at once.

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


def _facts(dense: Session) -> dict[str, Any]:
    tokens = dense.calibration
    return {
        "versions": installed_versions(),
        "machine": machine(),
        "device": str(dense.model.device),
        "model": dense.fingerprint().model_dump(),
        "calibration": None if tokens is None else digest(tokens),
        "seed": dense.seed,
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
    blank = Cell(label="dense", after=run.dense.original)
    known = run.cache.find(Cell, facts, partial(is_cell, blank=blank))
    if known is not None:
        return known
    if run.known:
        return blank.model_copy(update={"error": _NOT_MEASURED})
    say("the dense model …")
    # Measured on a copy like all other cells, so that peak memory includes the same models.
    session = _copy(run.dense)
    cell = Cell(label="dense", after=session.original)
    cell = cell.model_copy(update={"measured": _measure(run.comparison.evaluators, session, {})})
    run.cache.add(cell, facts)
    return cell


def _method(run: _Run, method: Method, target: Target) -> Iterator[Cell]:
    """A cell for every recovery; they share one plan, made when the first cell needs it."""
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
        known = run.cache.find(Cell, cell_facts, partial(is_cell, blank=blank))
        if known is not None:
            say("  cached")
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
        cell = _cell(run, blank, planned, method.behind(recovery))
        if cell.error:
            say(f"  {cell.error}")
        else:
            run.cache.add(cell, cell_facts)
        yield cell


def _naming(recovery: Recovery | None) -> dict[str, Any]:
    """The fields of a cell that name its recovery."""
    if recovery is None:
        return {}
    return {
        "recovery": recovery.name,
        "recovery_options": recovery.options.model_dump(mode="json"),
        "recovered": named(recovery.name, recovery.options),
    }


def _planned(run: _Run, pruner: Pruner, facts: dict[str, Any]) -> Planned | SlmError:
    """The plan of a strategy for the dense model, or the error that prevented it.

    Raises:
        ContractError: The strategy changed the model. All other cells would copy the changed
            model, so the comparison ends; finished cells stay in the cache.
    """
    matches = partial(is_plan, facts=facts, dense=run.dense)
    known = run.cache.find(Planned, facts, matches)
    if known is not None:
        return known
    _seed(run.dense.seed)
    if pruner.needs_calibration:
        # One pass over the calibration set serves all strategies and is not part of their time.
        run.dense.captured()
    try:
        plan, cost = measure_cost(run.dense, lambda: run.dense.plan(pruner))
    except OutputError:
        raise
    except SlmError as error:
        if run.dense.spoiled:
            raise
        say(f"  {_one_line(error)}")
        return error
    planned = Planned(plan=plan, cost=cost)
    if matches(planned):
        run.cache.add(planned, facts)
    return planned


def _present(*recoveries: Recovery | None) -> list[Recovery]:
    return [recovery for recovery in recoveries if recovery is not None]


def _cell(run: _Run, blank: Cell, planned: Planned, recoveries: Sequence[Recovery]) -> Cell:
    """Prune a copy, repair it if asked to, and measure it; the cell reports any failure."""
    found: dict[str, Any] = {"planning": planned.cost, "warnings": planned.plan.warnings}
    measured: dict[str, tuple[Measurement, ...]] = {}
    try:
        session, found["recovering"] = _pruned(run.dense, planned.plan, recoveries)
        found["after"] = session.view.dimensions()
        _measure(run.comparison.evaluators, session, measured)
    except OutputError:
        raise
    except SlmError as error:
        found["error"] = _one_line(error)
    return blank.model_copy(update={**found, "measured": measured})


def _pruned(
    dense: Session, plan: PruningPlan, recoveries: Sequence[Recovery]
) -> tuple[Session, Cost | None]:
    """A new session with the model pruned and repaired, and the cost of the repair."""
    session = _copy(dense)
    dense.expect(recoveries)
    session.reference, session.keeps_layers = dense.reference, dense.keeps_layers
    session.apply(plan)
    if not recoveries:
        return session, None

    def repair() -> None:
        for recovery in recoveries:
            _seed(session.seed)
            session.recover(recovery)

    _, cost = measure_cost(session, repair)
    return session, cost


def _copy(dense: Session) -> Session:
    """A session on copies of the model, the tokenizer and the calibration set.

    A copy needs the memory of one more model but no second load. Unlike restored weights, it
    cannot carry over changes of shapes or of the configuration to the next cell.
    """
    tokens = dense.calibration
    return Session(
        copy.deepcopy(dense.model),
        copy.deepcopy(dense.tokenizer),
        None if tokens is None else tokens.clone(),
        source=dense.source,
        seed=dense.seed,
        journals=dense.journals,
    )


def _measure(
    evaluators: Sequence[Evaluator],
    session: Session,
    measured: dict[str, tuple[Measurement, ...]],
) -> dict[str, tuple[Measurement, ...]]:
    """Add all figures to ``measured``, by evaluator; they remain when a later evaluator fails."""
    session.release()
    for evaluator in evaluators:
        taken = tuple(session.measure(evaluator))
        measured[evaluator.name] = (*measured.get(evaluator.name, ()), *taken)
    return measured


def _one_line(error: SlmError) -> str:
    return " ".join(str(error).split())


def _seed(seed: int) -> None:
    """Seed before every step, so that no cell depends on earlier ones."""
    random.seed(seed)
    torch.manual_seed(seed)
