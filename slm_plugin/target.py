"""How much to prune, said in exactly one way."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import Self

from slm_plugin.counts import Count
from slm_plugin.record import Record

_SCALE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_COUNT = re.compile(r"\s*((?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,18})?)\s*([KMB]?)\s*", re.IGNORECASE)
KINDS = ("layers_removed", "ratio", "parameters", "threshold")


def parse_count(value: object) -> object:
    """Read ``100M``, ``1.2B`` or ``135000`` as a whole number; anything else passes unchanged."""
    if isinstance(value, str):
        match = re.fullmatch(
            r"\s*((?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,18})?)\s*([KMB]?)\s*",
            value,
            flags=re.IGNORECASE,
        )
        if match:
            return round(float(match[1]) * _SCALE[match[2].upper()])
    return value


class Target(Record):
    """How much a stage removes.

    ``ratio`` counts parameters with tied embeddings once. It is a share of the model as it was
    loaded (``of: original``), so that the ratios of several stages add up, unless ``of: current``
    makes it a share of what the stage finds.
    """

    layers_removed: Annotated[Count, Field(description="decoder layers to remove")] | None = None
    ratio: (
        Annotated[float, Field(gt=0, lt=1, description="share of parameters to remove")] | None
    ) = None
    parameters: (
        Annotated[
            int,
            BeforeValidator(parse_count),
            Field(ge=1, description="parameters to keep, as 100M, 1.2B or a number"),
        ]
        | None
    ) = None
    threshold: (
        Annotated[float, Field(description="the strategy's own threshold", allow_inf_nan=False)]
        | None
    ) = None
    of: Annotated[
        Literal["original", "current"], Field(description="what a ratio is a share of")
    ] = "original"

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        given = [kind for kind in KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            found = " and ".join(given) or "none"
            raise ValueError(f"give exactly one of {', '.join(KINDS)}; found {found}")
        if self.of != "original" and self.ratio is None:
            raise ValueError("`of` only says what a ratio is a share of; remove it")
        return self

    @property
    def kind(self) -> str:
        """Name of the one field that is set."""
        return next(kind for kind in KINDS if getattr(self, kind) is not None)

    def describe(self) -> str:
        """The target in words, as reports print it."""
        if self.ratio is not None:
            share = "the original" if self.of == "original" else "the current"
            return f"{self.ratio:.1%} of {share} parameters"
        if self.parameters is not None:
            return f"down to {self.parameters:,} parameters"
        if self.layers_removed is not None:
            return f"{self.layers_removed} layer{'s' * (self.layers_removed != 1)} removed"
        return f"threshold {self.threshold:g}"

    def parameters_to_remove(self, original: int, current: int) -> int:
        """Parameters that a ratio or a parameter count asks to remove, as a number.

        Args:
            original: Parameters of the model as it was loaded.
            current: Parameters of the model as the stage finds it.
        """
        if self.ratio is not None:
            return round(self.ratio * (original if self.of == "original" else current))
        if self.parameters is not None:
            return current - self.parameters
        raise ValueError(f"a target of kind {self.kind} does not count parameters")
