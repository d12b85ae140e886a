"""Whole numbers as options take them: within what can be counted, not merely within 64 bits."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

# Samples, tokens of one, layers, steps: more is a slip.
MOST = 10_000_000
# Seeds that every library underneath takes.
SEEDS = 2**32

Count = Annotated[int, Field(ge=1, le=MOST)]
Natural = Annotated[int, Field(ge=0, le=MOST)]
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
