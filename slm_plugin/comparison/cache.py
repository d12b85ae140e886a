"""Cache of a comparison's plans and measured cells, one file each.

A file's name is a hash of everything that its contents depend on. An interrupted comparison
therefore resumes, and one with more methods computes only the new cells. Each file has a checksum
over its contents and over the values that they depend on.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from slm_plugin.cache import checksum, set_aside
from slm_plugin.comparison.record import Cell, Planned
from slm_plugin.errors import SlmError, UserError
from slm_plugin.files import write_text
from slm_plugin.plans.check import check_plan
from slm_plugin.progress import say
from slm_plugin.session import Session
from slm_plugin.texts import read_text, shown

# Largest size of an entry in bytes; the plan of a large model has some millions.
LARGEST = 1 << 29

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class CellCache:
    """Cached plans and cells of comparisons.

    Attributes:
        folder: The cache folder.
        facts: What every entry of this comparison depends on.
        fresh: Ignore cached entries; new ones are still written.
    """

    folder: Path
    facts: Mapping[str, Any]
    fresh: bool = False

    def find(
        self,
        model: type[M],
        facts: Mapping[str, Any],
        matches: Callable[[M], bool] = lambda _: True,
    ) -> M | None:
        """The cached entry for these facts; None where there is none.

        A file that is damaged or does not match its facts is reported and set aside.

        Args:
            model: Type of the entry.
            facts: What the entry depends on, beside the facts of the whole comparison.
            matches: Whether an entry matches these facts.
        """
        path = self._path(model, facts)
        if self.fresh or not os.path.lexists(path):
            return None
        try:
            if not path.is_file():
                raise ValueError("it is not a regular file")
            entry = self._read(model, path, facts)
            if not matches(entry):
                raise ValueError("it belongs to another entry")
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SlmError) as error:
            self._set_aside(path, error)
            return None
        return entry

    def store(self, entry: BaseModel, facts: Mapping[str, Any]) -> None:
        """Write an entry atomically.

        Raises:
            OutputError: The file cannot be written.
        """
        content = entry.model_dump(mode="json")
        sealed = {"sum": self._sum(content, facts), "content": content}
        write_text(self._path(type(entry), facts), json.dumps(sealed, ensure_ascii=False))

    def _read(self, model: type[M], path: Path, facts: Mapping[str, Any]) -> M:
        # Perplexities can be infinite; Python's JSON reads that, the standard does not define it.
        sealed = json.loads(read_text(path, "the cached result", UserError, LARGEST))
        if not isinstance(sealed, dict) or "sum" not in sealed:
            raise ValueError("it has no checksum")
        if sealed["sum"] != self._sum(sealed["content"], facts):
            raise ValueError("its checksum does not match")
        return model.model_validate(sealed["content"])

    def _set_aside(self, path: Path, error: Exception) -> None:
        known = isinstance(error, ValueError) and not isinstance(error, ValidationError)
        reason = shown(error, 200) if known else "it cannot be read"
        try:
            aside = set_aside(path)
        except OSError:
            say(f"  the cached result {path} is damaged ({reason}); it is computed again")
            return
        if aside is not None:
            say(
                f"  the cached result {path} is damaged ({reason}) and was set aside as "
                f"{aside.name}; it is computed again"
            )

    def _sum(self, content: Any, facts: Mapping[str, Any]) -> str:
        return checksum(self._everything(facts), content)

    def _everything(self, facts: Mapping[str, Any]) -> str:
        return json.dumps({**self.facts, **facts}, sort_keys=True, default=str)

    def _path(self, model: type[BaseModel], facts: Mapping[str, Any]) -> Path:
        name = hashlib.sha256(self._everything(facts).encode()).hexdigest()[:32]
        return self.folder / f"{name}.{model.__name__.lower()}.json"


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
