"""The allocations by name, and the cut that one of them leads to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias

from slm_plugin.plans import UnitScores
from slm_plugin.pruners.layer_sparsity.outliers import owl
from slm_plugin.pruners.layer_sparsity.redundancy import influence, layer_redundancy
from slm_plugin.pruners.layer_sparsity.spectra import alpha
from slm_plugin.pruners.width.allocation.pooled import pooled
from slm_plugin.pruners.width.allocation.progression import atp
from slm_plugin.pruners.width.allocation.projection import Limits, kept_channels
from slm_plugin.pruners.width.budget import Cut

if TYPE_CHECKING:
    from slm_plugin.session import Session

AllocationName = Literal[
    "alpha", "alpha_peak", "atp", "global", "influence", "layer_redundancy", "owl", "uniform"
]
# Those that stretch a quality of the layers by `spread`.
STRETCHED: dict[str, Callable[[Session, float], list[float]]] = {
    "alpha": lambda session, spread: alpha(session.view, spread),
    "alpha_peak": lambda session, spread: alpha(session.view, spread, peak=True),
    "influence": influence,
    "layer_redundancy": layer_redundancy,
    "owl": owl,
}
# They look at weights alone.
WITHOUT_DATA = ("alpha", "alpha_peak", "uniform")
# Scores that only rank the units of one layer, or measure them by what the layer has lost so far.
NOT_POOLED = ("contribution", "obs")
Score: TypeAlias = "Callable[[Session, Cut], tuple[UnitScores, ...]]"


@dataclass(frozen=True, slots=True)
class Stage:
    """What an allocation is asked for.

    Attributes:
        session: The session, whose model stays as it is.
        limits: Bounds and sum of the channels.
        kv_groups: KV groups to remove from every layer.
        score: Scores the units of a session's model for a cut.
        query_heads: Query heads to remove from every KV group, where no whole group goes.
    """

    session: Session
    limits: Limits
    kv_groups: int
    score: Score
    query_heads: int = 0

    def cut(self, relative: Sequence[float]) -> Cut:
        """The cut for relative sparsities of the layers."""
        kept = kept_channels(relative, self.limits)
        before = self.session.view.dimensions()
        return Cut.keeping(kept, self.kv_groups, before, self.query_heads)

    @property
    def even(self) -> Cut:
        """The cut that takes the same share from every layer."""
        return self.cut([1.0] * len(self.limits.widths))


def allocated(
    name: AllocationName, spread: float, stage: Stage
) -> tuple[Cut, tuple[UnitScores, ...]]:
    """The cut by an allocation, and the scores of the units that are ranked for it.

    Args:
        name: The allocation.
        spread: How far relative sparsities lie apart, where the allocation leaves that open.
        stage: What is asked for.

    Raises:
        CalibrationError: There is no calibration set, or too small a one.
        NumericalError: The loss, a score or a measure of a layer is NaN or infinite.
    """
    session, limits = stage.session, stage.limits
    if name == "global":
        scores = stage.score(session, stage.even)
        channels = [one for one in scores if one.unit == "mlp_channel"]
        return stage.cut(pooled(channels, sum(limits.widths) - limits.kept)), scores
    if name == "atp":
        even, keep = stage.even, partial(kept_channels, limits=limits)
        cut = stage.cut(atp(session, limits.sparsity, lambda one: stage.score(one, even), keep))
    elif name == "uniform":
        cut = stage.even
    else:
        cut = stage.cut(STRETCHED[name](session, spread))
    return cut, stage.score(session, cut)
