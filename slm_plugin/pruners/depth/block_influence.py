"""ShortGPT: drop the layers that change the hidden state least.

Source: ShortGPT (arXiv 2403.03853). All layers are scored once, on the original model; dropping a
layer does not change the other scores.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from slm_plugin.plans import LayerScores, PruningPlan
from slm_plugin.pruners.depth.depth_plan import depth_plan
from slm_plugin.pruners.depth.dropping import BetweenEnds, lowest, one_by_one
from slm_plugin.pruners.influence import block_influence
from slm_plugin.registry import register_pruner

if TYPE_CHECKING:
    from slm_plugin.session import Session


@register_pruner("block_influence")
class BlockInfluence(BetweenEnds):
    """Drop the layers of least block influence (ShortGPT).

    As published, no layer is protected. Unofficial code compares the last layer's input with its
    output after the final norm, which raises its influence and so protects it unintentionally. Here
    both are taken before the norm; use ``protect_last`` to protect it.
    """

    unlisted: ClassVar[bool] = True
    whole_layers: ClassVar[bool] = True
    streams: ClassVar = True

    def plan(self, session: Session) -> PruningPlan:
        """Score every layer once and drop the lowest.

        Raises:
            TargetError: The target cannot be reached.
            NumericalError: A hidden state is NaN or zero.
        """
        wanted = self.wanted(session)
        scores = block_influence(session.view, session.captured())
        dropped = lowest(scores, wanted, self.removable(session.view))
        meaning = "block influence: 1 minus the mean cosine of a layer's input and output"
        return depth_plan(
            self,
            session,
            one_by_one(dropped),
            ["layers are removed in the order of their block influence in the original model"],
            layer_scores=LayerScores(meaning=meaning, scores=tuple(scores)),
        )
