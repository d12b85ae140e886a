"""LLM-Streamline: a replacement layer for the span that changes the hidden state least.

Source: LLM-Streamline (arXiv 2403.19135) and its released code. The replacement layer is
initialised with the lowest layer of the span, as in the code; `recover: streamline` trains it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from slm_plugin.errors import TargetError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.plans import LayerScores, MergeLayers, PruningPlan
from slm_plugin.pruners import base
from slm_plugin.pruners.depth.depth_plan import depth_plan, kinds_of
from slm_plugin.pruners.depth.dropping import BetweenEnds, lowest
from slm_plugin.pruners.depth.search.runs import alike
from slm_plugin.pruners.influence import block_influence
from slm_plugin.registry import register_pruner

if TYPE_CHECKING:
    from slm_plugin.session import Session


@register_pruner("streamline")
class Streamline(BetweenEnds):
    """Replace the span whose input and output are most similar by one layer (Streamline).

    To remove n layers, a span of n + 1 is replaced. The released code compares a span that ends at
    the last layer after the final norm; here all spans are compared before it.
    """

    streams: ClassVar = True
    merges: ClassVar = True

    def check_target(self, original: Dimensions, current: Dimensions) -> None:
        """Check that the protected layers leave enough; one layer of the span remains."""
        wanted = base.layers_to_remove(self.target, original, current)
        most = max(0, self.most_removable(current) - 1)
        protection = self.describe_protection(current)
        base.refuse_beyond(self.target, wanted, most, current.layers, protection)

    def plan(self, session: Session) -> PruningPlan:
        """Score every span of the required size and replace the one with the least influence.

        Raises:
            TargetError: The target cannot be reached.
            NumericalError: A hidden state is NaN or zero.
        """
        wanted = self.wanted(session)
        span = wanted + 1
        kinds = kinds_of(session.view)
        scores = block_influence(session.view, session.captured(), span)
        # A span counted as one layer has as many positions as the pruned model has layers.
        low_ends = [
            low
            for low in self.removable(session.view, len(scores))
            if alike(kinds, low, low + span - 1)
        ]
        if not low_ends:
            raise TargetError(
                f"no {span} adjacent layers are of one kind, so none can replace them",
                hint="remove fewer layers, or take another strategy",
            )
        (first,) = lowest(scores, 1, low_ends)
        meaning = f"1 minus the mean cosine across {span} layers, by the lowest of them"
        return depth_plan(
            self,
            session,
            [MergeLayers(first=first, last=first + wanted, rule="keep_low")],
            [
                f"of all spans of {span} layers, this one changes the hidden state least; its "
                "lowest layer replaces it, to be trained by `recover: streamline`"
            ],
            layer_scores=LayerScores(meaning=meaning, scores=tuple(scores)),
        )
