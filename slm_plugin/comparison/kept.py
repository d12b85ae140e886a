"""What is kept of a comparison while it runs: a file for every plan made and every cell measured.

A file's name stands for everything that its contents depend on, so that a comparison that was
killed goes on where it stopped, and one with more methods only adds to one with fewer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel

from slm_plugin.files import write_text

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

    def find(self, model: type[M], facts: Mapping[str, Any]) -> M | None:
        """The piece that depends on these facts; None where there is none that can be read."""
        if self.fresh:
            return None
        try:
            # Perplexities overflow: Python's JSON has words for infinity, the standard has not.
            data = json.loads(self._path(model, facts).read_text(encoding="utf-8"))
            return model.model_validate(data)
        except (OSError, ValueError):
            return None

    def keep(self, piece: BaseModel, facts: Mapping[str, Any]) -> None:
        """Write a piece, whole or not at all.

        Raises:
            OutputError: The file cannot be written.
        """
        text = json.dumps(piece.model_dump(mode="json"), ensure_ascii=False)
        write_text(self._path(type(piece), facts), text)

    def _path(self, model: type[BaseModel], facts: Mapping[str, Any]) -> Path:
        everything = json.dumps({**self.facts, **facts}, sort_keys=True, default=str)
        name = hashlib.sha256(everything.encode()).hexdigest()[:32]
        return self.folder / f"{name}.{model.__name__.lower()}.json"
