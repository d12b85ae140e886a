"""The options of `hybrid`."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from slm_plugin.counts import Count
from slm_plugin.pruners.depth.dropping import EndsOptions
from slm_plugin.pruners.hybrid.workload import Workload

# Layers that the search for layers judges at each step, unless asked otherwise.
SCREEN = 5


class HybridOptions(EndsOptions, Workload):
    """How depth and width are chosen, and the workload that latency and memory refer to."""

    search: Annotated[
        Literal["uniform", "integer"],
        Field(
            description="uniform: layers of one width; integer: a width for every layer of its "
            "own, by an integer programme; a checkpoint is padded with zeros then"
        ),
    ] = "uniform"
    repair: Annotated[
        Literal["boundary", "fold_linear"],
        Field(description="repair inside the search for layers; see `repaired`"),
    ] = "boundary"
    screen: Annotated[
        Count,
        Field(description="of uniform: layers that are judged at each step of that search"),
    ] = SCREEN
    score: Annotated[
        Literal[
            "taylor_second",
            "taylor",
            "taylor_sum",
            "taylor_mixed",
            "magnitude",
            "activation",
            "contribution",
            "flap",
            "leverage",
            "wanda_sp",
        ],
        Field(description="ranks MLP channels and KV groups; see `width`"),
    ] = "taylor_second"
    kv_groups: Annotated[bool, Field(description="KV groups may be removed too")] = False
    multiple_of: Annotated[
        Count, Field(description="a smaller number of MLP channels is a multiple of this")
    ] = 8
    verify: Annotated[
        Count, Field(description="shapes that are measured after their restoration")
    ] = 8

    @model_validator(mode="after")
    def _used(self) -> Self:
        """Settings that have no effect are mistakes."""
        if self.search == "integer" and self.kv_groups:
            raise ValueError(
                "search integer chooses layers and MLP channels alone; leave kv_groups out, or "
                "set search: uniform"
            )
        if self.search == "integer" and self.screen != SCREEN:
            raise ValueError("screen has no effect with search integer; leave it out")
        return self

    @property
    def workload(self) -> Workload:
        """What latency and memory refer to."""
        return Workload.of(self)
