"""ShortGPT: drop the layers that turn the hidden state least.

Source: ShortGPT (arXiv 2403.03853). The layers are scored once, on the whole model: what one layer
is worth after another has gone is not looked at.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from slm_plugin.plans import LayerScores, PruningPlan
from slm_plugin.pruners.depth.decision import depth_plan
from slm_plugin.pruners.depth.dropping import BetweenEnds, lowest, one_by_one
from slm_plugin.pruners.depth.measures.influence import block_influence
from slm_plugin.registry import register_pruner

if TYPE_CHECKING:
    from slm_plugin.session import Session


@register_pruner("block_influence")
class BlockInfluence(BetweenEnds):
    """Drop the layers of least block influence (ShortGPT).

    As published, no layer is protected. Unofficial code compares the last layer's input with its
    output behind the final norm, which raises its influence and so protects it by accident; here
    both are taken before the norm, and ``protect_last`` says it openly.
    """

    streams: ClassVar = True

    def plan(self, session: Session) -> PruningPlan:
        """Score every layer once and drop the lowest.

        Raises:
            TargetError: The target cannot be reached.
            NumericalError: A hidden state is NaN or zero.
        """
        wanted = self.wanted(session)
        scores = block_influence(session.view, session.captured())
        gone = lowest(scores, wanted, self.eligible(len(scores)))
        meaning = "block influence: 1 minus the mean cosine of a layer's input and output"
        return depth_plan(
            self,
            session,
            one_by_one(gone),
            ["layers go in the order of their block influence on the whole model"],
            layer_scores=LayerScores(meaning=meaning, scores=tuple(scores)),
        )
