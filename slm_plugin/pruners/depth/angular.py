"""The unreasonable ineffectiveness of the deeper layers: drop the block of least angular distance.

Source: Gromov et al. (arXiv 2403.17887), the layer-pruning algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from slm_plugin.calibration.captures import Batch
from slm_plugin.calibration.frames import attending, mean_over
from slm_plugin.lazy import inference_mode, torch
from slm_plugin.plans import DropLayers, LayerScores, PruningPlan
from slm_plugin.pruners.depth.depth_plan import depth_plan
from slm_plugin.pruners.depth.dropping import BetweenEnds, lowest
from slm_plugin.registry import register_pruner

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session


@register_pruner("angular")
class AngularDistance(BetweenEnds):
    """Drop the contiguous block whose input and output differ least in angle (Gromov et al.).

    As published, any block may be dropped, including the lowest and the highest layer. The hidden
    state is that of the last token of every sample, which attends to all others. In an encoder
    every position does, and the angle is the mean over those that are no padding.
    """

    unlisted: ClassVar[bool] = True
    whole_layers: ClassVar[bool] = True
    streams: ClassVar = True

    def plan(self, session: Session) -> PruningPlan:
        """Score every block of the required size and drop the one of least distance.

        Raises:
            TargetError: The target cannot be reached.
            NumericalError: A hidden state is NaN or zero.
        """
        wanted = self.wanted(session)
        scores = distances(session.captured(), wanted)
        # A block counted as one layer has as many positions as the shortened model has layers.
        (start,) = lowest(scores, 1, self.removable(session.view, len(scores)))
        block = tuple(range(start, start + wanted))
        meaning = f"angular distance over {wanted} layers, 0 to 1, by the lowest of them"
        return depth_plan(
            self,
            session,
            [DropLayers(indices=block)],
            [f"of all blocks of {wanted}, this one changes the last token's hidden state least"],
            layer_scores=LayerScores(meaning=meaning, scores=tuple(scores)),
        )


@inference_mode
def distances(captured: Sequence[Batch], layers: int) -> list[float]:
    """Mean angular distance over every block of consecutive layers, padding left out.

    The last state is taken before the final norm.

    Args:
        captured: The inputs of the model's layers.
        layers: Layers of a block.

    Returns:
        One number per block, by its lowest layer: ``layers of the model - layers + 1`` of them.
    """
    blocks = len(captured[0].inputs) - layers
    samples = [[_distance(batch, start, layers) for batch in captured] for start in range(blocks)]
    return [float(torch.cat(each).mean()) for each in samples]


def _distance(batch: Batch, start: int, layers: int) -> Tensor:
    """Angle between the input of a block and its output, a mean per sample ``(samples,)``."""
    sees_all = batch.sees_all
    below, valid = attending(batch.inputs[start], batch.valid, sees_all=sees_all)
    above, _ = attending(batch.inputs[start + layers], batch.valid, sees_all=sees_all)
    return mean_over(angular_distance(below, above), valid).cpu()


def block_distances(states: Tensor, layers: int) -> list[float]:
    """Mean angular distance over every block of consecutive layers.

    Args:
        states: ``(layers of the model + 1, samples, hidden)``.
        layers: Layers of a block.

    Returns:
        One number per block, by its lowest layer: ``layers of the model - layers + 1`` of them.
    """
    below, above = states[:-layers], states[layers:]
    return angular_distance(below, above).mean(-1).tolist()


def angular_distance(x: Tensor, y: Tensor) -> Tensor:
    """Angle between vectors along the last axis, as a share of a half turn.

    ``arccos`` of the cosine loses half the digits for small angles, the ones that are compared,
    and is NaN where rounding gives a cosine above 1. The angle between unit vectors is
    also ``2 atan2(|x - y|, |x + y|)``, which has neither problem: equal vectors give exactly 0.

    Args:
        x: ``(..., hidden)``.
        y: ``(..., hidden)``.

    Returns:
        ``(...)``, from 0 to 1, in float64; NaN for a vector that is zero.
    """
    x, y = x.double(), y.double()
    x = x / torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    y = y / torch.linalg.vector_norm(y, dim=-1, keepdim=True)
    apart = torch.linalg.vector_norm(x - y, dim=-1)
    together = torch.linalg.vector_norm(x + y, dim=-1)
    return 2 * torch.atan2(apart, together) / math.pi
