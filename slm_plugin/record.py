"""The base of all data that is written to files or read from them."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Record(BaseModel):
    """Fixed fields: unknown ones are errors, and none changes after it is set."""

    model_config = ConfigDict(extra="forbid", frozen=True)
