"""LLM-Streamline: one light layer takes the place of the span that turns the hidden state least.

Source: LLM-Streamline (arXiv 2403.19135) and its released code. The light layer starts as the
lowest layer of the span, as in the code; `recovery.streamline` trains it to stand for all of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from slm_plugin.models.view import Dimensions
from slm_plugin.plans import LayerScores, MergeLayers, PruningPlan
from slm_plugin.pruners import base
from slm_plugin.pruners.depth.decision import depth_plan, refuse_mixed_kinds
from slm_plugin.pruners.depth.dropping import BetweenEnds, lowest
from slm_plugin.pruners.depth.measures.influence import block_influence
from slm_plugin.registry import register_pruner

if TYPE_CHECKING:
    from slm_plugin.session import Session


@register_pruner("streamline")
class Streamline(BetweenEnds):
    """Put one layer in the place of the span whose input and output are most alike (Streamline).

    To remove n layers a span of n + 1 is looked for. The released code compares a span that ends
    at the last layer behind the final norm; here all are compared before it.
    """

    streams: ClassVar = True

    def check_target(self, original: Dimensions, current: Dimensions) -> None:
        """Refuse what the protected layers do not leave room for: one of the span stays."""
        wanted = base.layers_to_remove(self.target, original, current)
        most = max(0, len(self.eligible(current.layers)) - 1)
        base.refuse_beyond(self.target, wanted, most, current.layers, self.protection)

    def plan(self, session: Session) -> PruningPlan:
        """Measure every span of the wanted size and merge the one that does least.

        Raises:
            TargetError: The target cannot be reached.
            UnsupportedModelError: The layers are of different kinds.
            NumericalError: A hidden state is NaN or zero.
        """
        wanted = self.wanted(session)
        refuse_mixed_kinds(self, session.view)
        span = wanted + 1
        scores = block_influence(session.view, session.captured(), span)
        # Seen as one layer, the span has as many places as a layer of the model that is left.
        (first,) = lowest(scores, 1, self.eligible(len(scores)))
        meaning = f"1 minus the mean cosine across {span} layers, by the lowest of them"
        return depth_plan(
            self,
            session,
            [MergeLayers(first=first, last=first + wanted, rule="keep_low")],
            [
                f"of all spans of {span} layers, this one turns the hidden state least; its "
                "lowest layer stays for all of them, to be trained by `recover: streamline`"
            ],
            layer_scores=LayerScores(meaning=meaning, scores=tuple(scores)),
        )
