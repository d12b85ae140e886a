"""Drop the deepest layers but the last one.

Source: Gromov et al. (arXiv 2403.17887), the simple heuristic: it needs no data, and the model
needs a recovery afterwards.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from slm_plugin.plans import PruningPlan
from slm_plugin.pruners.depth.depth_plan import depth_plan
from slm_plugin.pruners.depth.dropping import LayerDropping, one_by_one
from slm_plugin.registry import register_pruner

if TYPE_CHECKING:
    from slm_plugin.session import Session


@register_pruner("deepest")
class Deepest(LayerDropping):
    """Drop the deepest layers except the last one; reads neither data nor weights."""

    unlisted: ClassVar[bool] = True
    whole_layers: ClassVar[bool] = True
    streams: ClassVar = True
    protection: ClassVar = "the last layer kept"

    @property
    def needs_calibration(self) -> bool:
        """No data is used."""
        return False

    def eligible(self, layers: int) -> range:
        """All layers but the last."""
        return range(layers - 1)

    def plan(self, session: Session) -> PruningPlan:
        """Drop layers downwards from the one below the last.

        Raises:
            TargetError: The target cannot be reached.
        """
        wanted = self.wanted(session)
        deepest_first = self.removable(session.view)[::-1]
        return depth_plan(
            self,
            session,
            one_by_one(deepest_first[:wanted]),
            ["the deepest layers except the last one are removed; the model needs a recovery"],
        )
