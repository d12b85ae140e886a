"""Uniform structured width pruning of MLP channels and KV groups with torch-pruning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from slm_plugin.component import Options
from slm_plugin.plans import UnitScores
from slm_plugin.pruners.width.budget import Cut
from slm_plugin.pruners.width.importance import magnitude, taylor
from slm_plugin.pruners.width.uniform import KvGroups, MultipleOf, UniformWidth
from slm_plugin.registry import register_pruner
from slm_plugin.target import Target

if TYPE_CHECKING:
    from slm_plugin.session import Session


class TorchPruningOptions(Options):
    """Importance score, and how the removal is split between MLP and attention."""

    importance: Annotated[
        Literal["magnitude", "taylor"],
        Field(description="taylor reads the calibration set, magnitude only the weights"),
    ] = "taylor"
    kv_groups: KvGroups = "auto"
    multiple_of: MultipleOf = 8

    former: ClassVar = {"norm": "magnitude sums the squares of the weights"}


@register_pruner("torch_pruning")
class TorchPruning(UniformWidth):
    """Remove the same number of MLP channels and KV groups from every layer.

    Each layer ranks its own units. The result has uniform layers and loads with stock classes.
    The coupled groups are checked against torch-pruning's dependency graph; surgery uses
    torch-pruning's primitives.
    """

    Options = TorchPruningOptions

    def __init__(self, options: TorchPruningOptions, target: Target) -> None:
        super().__init__(
            options, target, kv_groups=options.kv_groups, multiple_of=options.multiple_of
        )
        self.options: TorchPruningOptions = options

    @property
    def needs_calibration(self) -> bool:
        """Magnitudes need only the weights; Taylor scores need calibration data."""
        return self.options.importance == "taylor"

    def score(self, session: Session, cut: Cut) -> tuple[UnitScores, ...]:
        """See `UniformWidth.score`."""
        if self.options.importance == "taylor":
            return taylor(session.view, session.batches())
        return magnitude(session.view)
