"""Uniform structured width pruning of MLP channels and KV groups with torch-pruning."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from slm_plugin.component import Options
from slm_plugin.counts import Count, Natural
from slm_plugin.extras import require
from slm_plugin.models.view import Dimensions
from slm_plugin.plans import KeepChannels, KeepHeads, PruningPlan, UnitScores
from slm_plugin.pruners.base import Pruner
from slm_plugin.pruners.width.budget import Cut, size_note, uniform_cut
from slm_plugin.pruners.width.coupling import check_coupling
from slm_plugin.pruners.width.importance import kept_units, magnitude, taylor
from slm_plugin.registry import register_pruner
from slm_plugin.surgery.portability import portability, refuse_unloadable
from slm_plugin.target import Target

if TYPE_CHECKING:
    from slm_plugin.models.families.family import Family
    from slm_plugin.session import Session


class TorchPruningOptions(Options):
    """Importance score, and how the removal is split between MLP and attention."""

    importance: Annotated[
        Literal["magnitude", "taylor"],
        Field(description="taylor reads the calibration set, magnitude only the weights"),
    ] = "taylor"
    kv_groups: Annotated[
        Annotated[Natural, Field(strict=True)] | Literal["auto"],
        Field(
            description="KV groups to remove from every layer, each with its query heads; auto "
            "removes the same share of them as of the prunable parameters, rounded down"
        ),
    ] = "auto"
    multiple_of: Annotated[
        Count, Field(description="the remaining intermediate size is a multiple of this")
    ] = 8

    former: ClassVar = {"norm": "magnitude sums the squares of the weights"}


@register_pruner("torch_pruning")
class TorchPruning(Pruner):
    """Remove the same number of MLP channels and KV groups from every layer.

    Each layer ranks its own units. The result has uniform layers and loads with stock classes.
    The coupled groups are checked against torch-pruning's dependency graph; surgery uses
    torch-pruning's primitives.
    """

    kind: ClassVar[Literal["depth", "width"]] = "width"
    targets: ClassVar[tuple[str, ...]] = ("ratio", "parameters")
    extra: ClassVar[str | None] = "width"
    Options = TorchPruningOptions

    def __init__(self, options: TorchPruningOptions, target: Target) -> None:
        super().__init__(options, target)
        self.options: TorchPruningOptions = options

    @property
    def needs_calibration(self) -> bool:
        """Magnitudes need only the weights; Taylor scores need calibration data."""
        return self.options.importance == "taylor"

    def check_target(self, original: Dimensions, current: Dimensions) -> None:
        """Check the target before any work.

        Raises:
            TargetError: The target is out of reach; the hint names the reachable range.
        """
        self._cut(original, current)

    @classmethod
    def unsuited(cls, family: Family, config: Mapping[str, Any]) -> str:
        """MLP channels at least must be removable."""
        return "" if "channels" in family.units else family.reason("channels")

    def plan(self, session: Session) -> PruningPlan:
        """Score all units and choose those that remain, without changing the model.

        Raises:
            TargetError: The target is out of reach; the hint names the reachable range.
            UnsupportedModelError: torch-pruning couples the projections differently.
            CalibrationError: Taylor importance without a calibration set.
            NumericalError: The loss or a score is NaN or infinite.
        """
        require("width", "the pruner torch_pruning")
        before = session.view.dimensions()
        cut = self._cut(session.original, before)
        after = before.without_units(cut.channels, cut.kv_groups)
        warnings = portability(before, after, session.view.config)
        check_coupling(session.view)
        scores = self._score(session)
        return PruningPlan(
            pruner=self.name,
            kind="width",
            options=self.options.model_dump(mode="json"),
            target=self.target,
            fingerprint=session.fingerprint(),
            before=before,
            after=after,
            operations=tuple(op for layer in scores for op in _operations(layer, cut)),
            scores=scores,
            notes=_notes(self.target, session.original, before, after),
            warnings=warnings,
        )

    def _cut(self, original: Dimensions, current: Dimensions) -> Cut:
        cut = uniform_cut(
            self.target,
            original,
            current,
            kv_groups=self.options.kv_groups,
            multiple_of=self.options.multiple_of,
        )
        refuse_unloadable(current, current.without_units(cut.channels, cut.kv_groups))
        return cut

    def _score(self, session: Session) -> tuple[UnitScores, ...]:
        if self.options.importance == "taylor":
            return taylor(session.view, session.batches())
        return magnitude(session.view)


def _operations(units: UnitScores, cut: Cut) -> list[KeepChannels | KeepHeads]:
    if units.unit == "mlp_channel" and cut.channels:
        return [KeepChannels(layer=units.layer, indices=kept_units(units.scores, cut.channels))]
    if units.unit == "kv_group" and cut.kv_groups:
        return [KeepHeads(layer=units.layer, kv_groups=kept_units(units.scores, cut.kv_groups))]
    return []


def _notes(
    target: Target, original: Dimensions, before: Dimensions, after: Dimensions
) -> tuple[str, ...]:
    """Notes on how the target was met."""
    return (
        f"every layer keeps {after.intermediate_size:,} of {before.intermediate_size:,} MLP "
        f"channels and {after.kv_heads} of {before.kv_heads} KV groups",
        size_note(target, original, before, after),
    )
