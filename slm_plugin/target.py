"""How much to prune, said in exactly one way."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, WithJsonSchema, model_validator
from typing_extensions import Self

from slm_plugin.counts import Count
from slm_plugin.record import Record

_NUMBER = r"\s*((?:0|[1-9][0-9]{0,17})(?:\.[0-9]{1,18})?)\s*"
_SCALE = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}
_COUNT = re.compile(rf"{_NUMBER}([KMBkmb]?)\s*")
_BYTES = {
    "": 1,
    **{"KB": 10**3, "MB": 10**6, "GB": 10**9},
    **{"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30},
}
_SIZE = re.compile(rf"{_NUMBER}((?:[KMGkmg][Ii]?[Bb])?)\s*")
KINDS = ("layers_removed", "ratio", "parameters", "threshold", "latency", "memory")


def parse_count(value: object) -> object:
    """Read ``100M``, ``1.2B`` or ``135000`` as a whole number; anything else passes unchanged."""
    return _scaled(value, _COUNT, _SCALE)


def parse_bytes(value: object) -> object:
    """Read ``300MB``, ``1.5GiB`` or ``300000000`` as bytes; anything else passes unchanged."""
    return _scaled(value, _SIZE, _BYTES)


def _scaled(value: object, form: re.Pattern[str], scale: Mapping[str, int]) -> object:
    match = form.fullmatch(value) if isinstance(value, str) else None
    return value if match is None else round(float(match[1]) * scale[match[2].upper()])


def _written(description: str, form: re.Pattern[str]) -> WithJsonSchema:
    """The schema of a whole number that may be written with a unit."""
    text = {"type": "string", "pattern": f"^{form.pattern}$"}
    number = {"type": "integer", "minimum": 1}
    return WithJsonSchema({"anyOf": [number, text], "description": description})


class LatencyTarget(Record):
    """Share of the dense model's time, for one of the two phases of generation."""

    prefill: Annotated[float, Field(gt=0, lt=1, description="share of its prefill")] | None = None
    decode: Annotated[float, Field(gt=0, lt=1, description="share of its decoding")] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.prefill is None) == (self.decode is None):
            found = "none" if self.prefill is None else "both"
            raise ValueError(f"give exactly one of prefill, decode; found {found}")
        return self

    @property
    def phase(self) -> Literal["prefill", "decode"]:
        """What is timed."""
        return "decode" if self.prefill is None else "prefill"

    @property
    def share(self) -> float:
        """Share of the dense model's time."""
        share = self.decode if self.prefill is None else self.prefill
        assert share is not None
        return share


class Target(Record):
    """How much a stage removes.

    ``ratio`` counts parameters with tied embeddings once. It is a share of the model as it was
    loaded (``of: original``), so that the ratios of several stages add up, unless ``of: current``
    makes it a share of what the stage finds. ``latency`` and ``memory`` refer to the workload that
    the strategy states; only strategies that measure time or count bytes take them.
    """

    layers_removed: Annotated[Count, Field(description="decoder layers to remove")] | None = None
    ratio: (
        Annotated[float, Field(gt=0, lt=1, description="share of parameters to remove")] | None
    ) = None
    parameters: (
        Annotated[
            int,
            BeforeValidator(parse_count),
            Field(ge=1),
            _written("parameters to keep, as 100M, 1.2B or a number", _COUNT),
        ]
        | None
    ) = None
    threshold: (
        Annotated[float, Field(description="the strategy's own threshold", allow_inf_nan=False)]
        | None
    ) = None
    latency: Annotated[
        LatencyTarget | None, Field(description="share of the original model's time to reach")
    ] = None
    memory: (
        Annotated[
            int,
            BeforeValidator(parse_bytes),
            Field(ge=1),
            _written("bytes of weights and KV cache, as 300MB, 1.5GiB or a number", _SIZE),
        ]
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

    @property
    def counts(self) -> bool:
        """Whether it counts layers or parameters, so that it alone says how much is removed."""
        return self.kind in ("layers_removed", "ratio", "parameters")

    def describe(self) -> str:
        """The target in words, as reports print it."""
        if self.ratio is not None:
            share = "the original" if self.of == "original" else "the current"
            return f"{self.ratio:.1%} of {share} parameters"
        if self.parameters is not None:
            return f"down to {self.parameters:,} parameters"
        if self.layers_removed is not None:
            return f"{self.layers_removed} layer{'s' * (self.layers_removed != 1)} removed"
        if self.latency is not None:
            return f"{self.latency.share:.1%} of the original {self.latency.phase} time"
        if self.memory is not None:
            return f"down to {self.memory:,} bytes of weights and KV cache"
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
