"""Cache of a comparison's plans and measured cells.

All that share a model, calibration tokens, seed, versions and machine are in one file, so that an
interrupted comparison resumes, and one with more methods computes only the new cells.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from slm_plugin.cache import Store, hashed
from slm_plugin.comparison.record import Cell, Planned
from slm_plugin.errors import SlmError
from slm_plugin.plans.check import check_plan
from slm_plugin.session import Session

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class CellCache:
    """Cached plans and cells of comparisons.

    Attributes:
        store: Their data, by the name of their type and the facts that they depend on.
        fresh: Ignore cached entries; new ones are still written.
    """

    store: Store
    fresh: bool = False

    @classmethod
    def of(
        cls, folder: Path, facts: Mapping[str, Any], *, fresh: bool = False, known: bool = False
    ) -> CellCache:
        """The cache of a comparison.

        Args:
            folder: The cache folder.
            facts: What every entry of this comparison depends on.
            fresh: Ignore cached entries; new ones are still written.
            known: Only read.

        Raises:
            OutputError: The file cannot be read or written.
        """
        store = Store.of(folder, hashed([_text(facts)]), _is_entry, writable=not known)
        return cls(store, fresh)

    def find(
        self,
        model: type[M],
        facts: Mapping[str, Any],
        matches: Callable[[M], bool] = lambda _: True,
    ) -> M | None:
        """The cached entry for these facts; None where there is none that matches them.

        Args:
            model: Type of the entry.
            facts: What the entry depends on, beside the facts of the whole comparison.
            matches: Whether an entry matches these facts.
        """
        content = None if self.fresh else self.store.find([model.__name__, _text(facts)])
        if content is None:
            return None
        try:
            entry = model.model_validate(content)
            return entry if matches(entry) else None
        except (ValueError, SlmError):
            return None

    def add(self, entry: BaseModel, facts: Mapping[str, Any]) -> None:
        """Write an entry.

        Raises:
            OutputError: The file cannot be written.
        """
        self.store.store([type(entry).__name__, _text(facts)], entry.model_dump(mode="json"))


def is_plan(planned: Planned, facts: Mapping[str, Any], dense: Session) -> bool:
    """Whether a plan has the method and the target of these facts and is for this model.

    Raises:
        PlanError: It contradicts itself.
    """
    plan = planned.plan
    check_plan(plan)
    found = plan.model_dump(mode="json", include={"pruner", "options", "target"})
    wanted = {"pruner": facts["method"], "options": facts["options"], "target": facts["target"]}
    same_model = plan.fingerprint == dense.fingerprint() and plan.before == dense.original
    return found == wanted and same_model


def is_cell(cell: Cell, blank: Cell) -> bool:
    """Whether a cell has the settings of a blank one, and all its figures are numbers."""
    settings = ("method", "options", "recovery", "recovery_options", "recovered", "target")
    figures = [figure for taken in cell.measured.values() for figure in taken]
    return all(getattr(cell, name) == getattr(blank, name) for name in settings) and not any(
        math.isnan(figure.value) or not math.isfinite(figure.stderr or 0) for figure in figures
    )


def _text(facts: Mapping[str, Any]) -> str:
    return json.dumps(facts, sort_keys=True, default=str)


def _is_entry(key: Any, value: Any) -> bool:
    kind, facts = key
    return isinstance(kind, str) and isinstance(facts, str) and isinstance(value, dict)
