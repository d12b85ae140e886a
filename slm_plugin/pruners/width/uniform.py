"""What strategies share that remove the same number of MLP channels and KV groups everywhere."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field

from slm_plugin.counts import Count, Natural
from slm_plugin.extras import require
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.plans import (
    KeepChannels,
    KeepHeads,
    KeepQueryHeads,
    Operation,
    PruningPlan,
    UnitScores,
)
from slm_plugin.pruners.base import Pruner
from slm_plugin.pruners.width.budget import Cut, uniform_cut
from slm_plugin.pruners.width.coupling import check_coupling
from slm_plugin.pruners.width.heads import joined_sections, sections
from slm_plugin.pruners.width.hidden_cut import NO_HIDDEN, HiddenCut
from slm_plugin.pruners.width.hidden_scores import StreamPlan
from slm_plugin.pruners.width.importance import kept_units
from slm_plugin.pruners.width.width_plan import width_plan
from slm_plugin.surgery.portability import portability, refuse_unloadable
from slm_plugin.target import Target

if TYPE_CHECKING:
    from slm_plugin.models.families.family import Family
    from slm_plugin.session import Session

KvGroups = Annotated[
    Annotated[Natural, Field(strict=True)] | Literal["auto"],
    Field(
        description="KV groups to remove from every layer, each with its query heads; auto "
        "removes the same share of them as of the prunable parameters, rounded down"
    ),
]
MultipleOf = Annotated[
    Count, Field(description="the remaining intermediate size is a multiple of this")
]


class UniformWidth(Pruner):
    """Remove the same number of MLP channels and KV groups from every layer.

    Each layer ranks its own units. The result has uniform layers and loads with stock classes.
    The coupled groups are checked against torch-pruning's dependency graph; surgery uses
    torch-pruning's primitives. A subclass implements `score`.

    Args:
        options: An instance of the class's ``Options``.
        target: How much to prune.
        kv_groups: KV groups to remove from every layer.
        multiple_of: The remaining intermediate size is a multiple of this.
        query_heads: Query heads to remove from every KV group, where no whole group goes.
        hidden: Hidden channels to remove from the whole model.
    """

    kind: ClassVar[Literal["depth", "width"]] = "width"
    targets: ClassVar[tuple[str, ...]] = ("ratio", "parameters")
    extra: ClassVar[str | None] = "width"

    def __init__(
        self,
        options: BaseModel,
        target: Target,
        *,
        kv_groups: int | Literal["auto"],
        multiple_of: int,
        query_heads: int = 0,
        hidden: HiddenCut = NO_HIDDEN,
    ) -> None:
        super().__init__(options, target)
        self._kv_groups, self._multiple_of = kv_groups, multiple_of
        self._query_heads, self._hidden = query_heads, hidden

    @abstractmethod
    def score(self, session: Session, cut: Cut) -> tuple[UnitScores, ...]:
        """The importance of every unit that may go, layer by layer.

        Args:
            session: The session, whose model must not change.
            cut: How many units of every layer will go.

        Raises:
            CalibrationError: There is no calibration set, and these scores need one.
            NumericalError: The loss or a score is NaN or infinite.
        """

    def stream_plan(self, session: Session, cut: Cut) -> StreamPlan:
        """What removes hidden channels, and the scores of all of them; nothing by default.

        Args:
            session: The session, whose model must not change.
            cut: What will go.

        Raises:
            CalibrationError: There is no calibration set, and these scores need one.
            NumericalError: The loss or a score is NaN or infinite.
        """
        return StreamPlan()

    def cautions(self, session: Session, cut: Cut) -> Iterator[str]:
        """Warnings about the scores; none by default.

        Args:
            session: The session.
            cut: How many units of every layer will go.
        """
        yield from ()

    def decide(self, session: Session, cut: Cut) -> tuple[Cut, tuple[UnitScores, ...]]:
        """The final cut with the scores for it; a subclass may spread it over the layers.

        Args:
            session: The session, whose model must not change.
            cut: The cut that takes the same share from every layer.

        Raises:
            CalibrationError: There is no calibration set, and it is needed.
            NumericalError: The loss or a score is NaN or infinite.
        """
        return cut, self.score(session, cut)

    def check_target(self, original: Dimensions, current: Dimensions) -> None:
        """Check the target before any work.

        Raises:
            TargetError: The target is out of reach; the hint names the reachable range.
        """
        self.cut(original, current)

    @classmethod
    def unsuited(cls, family: Family, config: Mapping[str, Any]) -> str:
        """MLP channels at least must be removable."""
        return "" if "channels" in family.units else family.reason("channels")

    def plan(self, session: Session) -> PruningPlan:
        """Score all units and choose those that remain, without changing the model.

        Raises:
            TargetError: The target is out of reach; the hint names the reachable range.
            UnsupportedModelError: torch-pruning couples the projections differently.
            CalibrationError: The scores need a calibration set and there is none.
            NumericalError: The loss or a score is NaN or infinite.
        """
        require("width", f"the pruner {self.name}")
        before = session.view.dimensions()
        cut = self.cut(session.original, before)
        # What cannot load is refused before the scores take their time.
        portability(before, cut.after(before), session.view.config)
        check_coupling(session.view)
        cut, scores = self.decide(session, cut)
        after = cut.after(before)
        warnings = (*portability(before, after, session.view.config), *self.cautions(session, cut))
        operations: list[Operation] = []
        for layer in scores:
            operations += operations_of(layer, cut, before)
        stream = self.stream_plan(session, cut)
        operations += stream.operations
        kept = _kept(before, after, self._hidden)
        made = width_plan(self, session, after, operations, scores, kept, warnings)
        return made.model_copy(update={"hidden_scores": stream.scores})

    def cut(self, original: Dimensions, current: Dimensions) -> Cut:
        """The cut that takes the same share from every layer.

        Raises:
            TargetError: The target is out of reach; the hint names the reachable range.
        """
        cut = uniform_cut(
            self.target,
            original,
            current,
            kv_groups=self._kv_groups,
            multiple_of=self._multiple_of,
            query_heads=self._query_heads,
            hidden=self._hidden,
        )
        refuse_unloadable(current, cut.after(current))
        return cut


def operations_of(
    units: UnitScores, cut: Cut, before: Dimensions
) -> list[KeepChannels | KeepHeads | KeepQueryHeads]:
    """What a layer keeps of the scored units; nothing where none of them go."""
    removed = cut.removed(units)
    if not (cut.channels if units.unit == "mlp_channel" else removed):
        return []
    parts = sections(units, before.kv_heads)
    kept = joined_sections((kept_units(part, removed) for part in parts), len(parts[0]))
    if units.unit == "mlp_channel":
        return [KeepChannels(layer=units.layer, indices=kept)]
    if units.unit == "query_head":
        return [KeepQueryHeads(layer=units.layer, query_heads=kept)]
    return [KeepHeads(layer=units.layer, kv_groups=kept)]


def _kept(before: Dimensions, after: Dimensions, cut: HiddenCut) -> str:
    heads = f"{after.kv_heads} of {before.kv_heads} KV groups"
    if after.queries_per_group < before.queries_per_group:
        queries = f"{after.queries_per_group} of {before.queries_per_group} query heads"
        heads = f"{queries} of each of {before.kv_heads} KV groups"
    channels = f"{after.width_range} of {before.width_range} MLP channels"
    hidden = ""
    if after.hidden_size != before.hidden_size:
        hidden = (
            f"; the model keeps {after.hidden_size:,} of {before.hidden_size:,} hidden channels"
            f"{_cost_of_rotation(before, cut)}"
        )
    return f"every layer keeps {channels} and {heads}{hidden}"


def _cost_of_rotation(before: Dimensions, cut: HiddenCut) -> str:
    """What a rotation adds, and how many channels must go for that."""
    added = replace(cut, count=0).after(before).parameters - before.parameters
    if added <= 0:
        return ""
    sizes = (replace(cut, count=n).after(before).parameters for n in range(before.hidden_size))
    least = next((n for n, size in enumerate(sizes) if size <= before.parameters), None)
    needed = "more than all" if least is None else f"{least}"
    does = [
        *(["unties the head"] if before.tied_embeddings else []),
        *([f"inserts {2 * before.layers} operators"] if cut.rotated == "block" else []),
    ]
    return (
        f"; the rotation {' and '.join(does)}, which adds {added:,} parameters: {needed} hidden "
        "channels must go before anything is saved"
    )
