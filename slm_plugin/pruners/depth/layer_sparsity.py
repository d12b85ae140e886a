"""Drop the layers that an allocation of width would prune most.

Source: the measures of AlphaPruning (arXiv 2410.10912) and OWL (arXiv 2310.05175), which their
papers use for a sparsity of each layer and not to drop layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from slm_plugin.models.families.family import Family
from slm_plugin.plans import LayerScores, PruningPlan
from slm_plugin.pruners.depth.depth_plan import depth_plan
from slm_plugin.pruners.depth.dropping import BetweenEnds, EndsOptions, lowest, one_by_one
from slm_plugin.pruners.layer_sparsity.outliers import owl
from slm_plugin.pruners.layer_sparsity.spectra import alpha
from slm_plugin.registry import register_pruner

if TYPE_CHECKING:
    from slm_plugin.session import Session

# Any spread gives the same order; with 1/2 the numbers are those of the measure, scaled to 0..1.
SPREAD = 0.5


class LayerSparsityOptions(EndsOptions):
    """The measure, and protected layers at both ends."""

    by: Annotated[
        Literal["alpha", "alpha_peak", "owl"],
        Field(description="exponents of the layers' spectra, or their shares of outliers"),
    ] = "alpha"


@register_pruner("layer_sparsity")
class LayerSparsity(BetweenEnds):
    """Drop the layers of highest relative sparsity by an allocation (AlphaPruning, OWL).

    The allocations ``influence`` and ``layer_redundancy`` of `width` rank layers as
    `block_influence` does, so they are not offered here.
    """

    streams: ClassVar[bool] = True
    Options: ClassVar = LayerSparsityOptions
    options: LayerSparsityOptions

    @classmethod
    def unsuited(cls, family: Family, config: Mapping[str, Any]) -> str:
        """It reads all linear maps of a layer."""
        return family.no_fit

    @property
    def needs_calibration(self) -> bool:
        """Spectra are those of the weights."""
        return self.options.by == "owl"

    def plan(self, session: Session) -> PruningPlan:
        """Score every layer once and drop the highest.

        Raises:
            TargetError: The target cannot be reached.
            NumericalError: A matrix has no tail to fit, or the model produces NaN or infinity.
        """
        wanted = self.wanted(session)
        if self.options.by == "owl":
            sparsities = owl(session, SPREAD)
        else:
            sparsities = alpha(session.view, SPREAD, peak=self.options.by == "alpha_peak")
        kept = [-one for one in sparsities]
        dropped = lowest(kept, wanted, self.removable(session.view))
        return depth_plan(
            self,
            session,
            one_by_one(dropped),
            ["layers are removed in the order of their relative sparsity in the original model"],
            layer_scores=LayerScores(
                meaning=f"relative sparsity by {self.options.by}, negated", scores=tuple(kept)
            ),
        )
