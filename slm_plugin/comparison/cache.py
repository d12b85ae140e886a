"""What is kept of a comparison while it runs: a file for every plan made and every cell measured.

A file's name stands for everything that its contents depend on, so that a comparison that was
killed goes on where it stopped, and one with more methods only adds to one with fewer. The file
carries a checksum over its contents and over all that they depend on.
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

# Bytes of a piece: the plan of a large model has some millions.
LARGEST = 1 << 29

M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True, slots=True)
class Kept:
    """Finished pieces of comparisons.

    Attributes:
        folder: Where they lie.
        facts: What every piece of this comparison depends on.
        fresh: Leave unread what lies there; it is written all the same.
    """

    folder: Path
    facts: Mapping[str, Any]
    fresh: bool = False

    def find(
        self,
        model: type[M],
        facts: Mapping[str, Any],
        fits: Callable[[M], bool] = lambda _: True,
    ) -> M | None:
        """The piece that depends on these facts; None where there is none.

        A file that is damaged, that was moved from other facts or does not fit is told and set
        aside.

        Args:
            model: What the piece is.
            facts: What it depends on, beside the facts of all pieces.
            fits: Whether what was read can belong to these facts.
        """
        path = self._path(model, facts)
        if self.fresh or not os.path.lexists(path):
            return None
        try:
            if not path.is_file():
                raise ValueError("it is no file")
            piece = self._read(model, path, facts)
            if not fits(piece):
                raise ValueError("it belongs to something else")
        except (OSError, ValueError, KeyError, TypeError, RecursionError, SlmError) as error:
            self._set_aside(path, error)
            return None
        return piece

    def keep(self, piece: BaseModel, facts: Mapping[str, Any]) -> None:
        """Write a piece, whole or not at all.

        Raises:
            OutputError: The file cannot be written.
        """
        content = piece.model_dump(mode="json")
        sealed = {"sum": self._sum(content, facts), "content": content}
        write_text(self._path(type(piece), facts), json.dumps(sealed, ensure_ascii=False))

    def _read(self, model: type[M], path: Path, facts: Mapping[str, Any]) -> M:
        # Perplexities overflow: Python's JSON has words for infinity, the standard has not.
        sealed = json.loads(read_text(path, "the cached result", UserError, LARGEST))
        if not isinstance(sealed, dict) or "sum" not in sealed:
            raise ValueError("it has no checksum")
        if sealed["sum"] != self._sum(sealed["content"], facts):
            raise ValueError("its checksum is another")
        return model.model_validate(sealed["content"])

    def _set_aside(self, path: Path, error: Exception) -> None:
        known = isinstance(error, ValueError) and not isinstance(error, ValidationError)
        reason = shown(error, 200) if known else "it cannot be read"
        try:
            aside = set_aside(path)
        except OSError:
            say(f"  the cached result {path} is damaged ({reason}); it is computed anew")
            return
        if aside is not None:
            say(
                f"  the cached result {path} is damaged ({reason}) and was set aside as "
                f"{aside.name}; it is computed anew"
            )

    def _sum(self, content: Any, facts: Mapping[str, Any]) -> str:
        return checksum(self._everything(facts), content)

    def _everything(self, facts: Mapping[str, Any]) -> str:
        return json.dumps({**self.facts, **facts}, sort_keys=True, default=str)

    def _path(self, model: type[BaseModel], facts: Mapping[str, Any]) -> Path:
        name = hashlib.sha256(self._everything(facts).encode()).hexdigest()[:32]
        return self.folder / f"{name}.{model.__name__.lower()}.json"


def is_plan(planned: Planned, facts: Mapping[str, Any], pristine: Session) -> bool:
    """Whether a plan is one of the method and the target of these facts, for this model.

    Raises:
        PlanError: It contradicts itself.
    """
    plan = planned.plan
    check_plan(plan)
    said = plan.model_dump(mode="json", include={"pruner", "options", "target"})
    wanted = {"pruner": facts["method"], "options": facts["options"], "target": facts["target"]}
    same_model = plan.fingerprint == pristine.fingerprint() and plan.before == pristine.original
    return said == wanted and same_model


def is_cell(cell: Cell, blank: Cell) -> bool:
    """Whether a cell is about what a blank one is about, and its figures are numbers."""
    about = ("method", "options", "recovery", "recovery_options", "recovered", "target")
    figures = [figure for taken in cell.measured.values() for figure in taken]
    return all(getattr(cell, name) == getattr(blank, name) for name in about) and not any(
        math.isnan(figure.value) or not math.isfinite(figure.stderr or 0) for figure in figures
    )
