"""Shortened LLaMA: score every layer once, by one of three scores, and drop the lowest-scored.

Source: Shortened LLaMA (arXiv 2402.02834) and its released code.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from slm_plugin.component import Options
from slm_plugin.models.view import DecoderView, layer_weights
from slm_plugin.plans import LayerScores, PruningPlan
from slm_plugin.pruners.depth.depth_plan import depth_plan
from slm_plugin.pruners.depth.dropping import LayerDropping, lowest, one_by_one
from slm_plugin.pruners.depth.search.runs import DROP
from slm_plugin.pruners.depth.search.trials import trials_of
from slm_plugin.pruners.gradients import loss_gradients
from slm_plugin.registry import register_pruner

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session

# Layers of the published keep-list, from the bottom and from the top.
KEPT_FIRST, KEPT_LAST = 4, 2
MEANINGS = {
    "loss": "increase of the calibration loss without the layer, in nats per token",
    "taylor": "sum over the layer's weights of |weight times gradient of the calibration loss|",
    "magnitude": "sum over the layer's weights of |weight|",
}


class ShortenedOptions(Options):
    """The layer score, and the published list of protected layers."""

    score: Annotated[
        Literal["loss", "taylor", "magnitude"],
        Field(description="loss is the published PPL; magnitude reads only the weights"),
    ] = "loss"
    keep_list: Annotated[
        bool,
        Field(description="protect the four lowest and the two highest layers (Taylor+, Mag+)"),
    ] = True


@register_pruner("shortened")
class Shortened(LayerDropping):
    """Drop the layers of lowest loss, Taylor or magnitude score (Shortened LLaMA).

    The keep-list is on by default for every score: so does the released code by
    default.
    """

    unlisted: ClassVar[bool] = True
    keeps_trials = True
    Options: ClassVar = ShortenedOptions
    options: ShortenedOptions

    @property
    def needs_calibration(self) -> bool:
        """Magnitudes need only the weights."""
        return self.options.score != "magnitude"

    @property
    def protection(self) -> str:
        """The keep-list, when it is enabled."""
        if self.options.keep_list:
            return f"keep_list (the {KEPT_FIRST} lowest and the {KEPT_LAST} highest layers)"
        return "no layer protected"

    def eligible(self, layers: int) -> range:
        """All layers, or those that are not on the keep-list."""
        return range(KEPT_FIRST, layers - KEPT_LAST) if self.options.keep_list else range(layers)

    def plan(self, session: Session) -> PruningPlan:
        """Score every layer of the original model and drop the lowest-scored.

        Raises:
            TargetError: The target cannot be reached.
            NumericalError: A loss or a score is NaN or infinite.
        """
        wanted = self.wanted(session)
        scores = self._scores(session)
        dropped = lowest(scores, wanted, self.removable(session.view))
        return depth_plan(
            self,
            session,
            one_by_one(dropped),
            ["layers are removed in the order of their scores in the original model"],
            layer_scores=LayerScores(meaning=MEANINGS[self.options.score], scores=tuple(scores)),
        )

    def _scores(self, session: Session) -> list[float]:
        if self.options.score == "magnitude":
            return magnitudes(session.view)
        if self.options.score == "taylor":
            return taylor(session.view, session.batches())
        return losses_without(session, self.name)


def losses_without(session: Session, name: str) -> list[float]:
    """Increase of the mean calibration loss when one layer of the original model is dropped.

    The published score is the perplexity without the layer, which gives the same order.

    Args:
        session: Holds the model and the calibration set.
        name: Name of the strategy, for the progress display.

    Returns:
        One number per layer, in nats per token.
    """
    with trials_of(session, name, "loss", DROP) as measure:
        return [-measure(layer, layer, ()).value for layer in range(len(session.view.layers))]


def taylor(view: DecoderView, batches: Iterable[Tensor]) -> list[float]:
    """Sum of ``|w * dL/dw|`` over all weights of each layer, norm gains included, biases not.

    L is the mean loss over all samples. Gradients are summed over all samples before the absolute
    value is taken, so the batch size does not matter. The released code does the same over its
    ten samples.

    Args:
        view: The model.
        batches: Calibration token ids, each ``(samples, length)``.

    Returns:
        One number per layer.

    Raises:
        NumericalError: The loss is NaN or infinite.
    """
    gradients = loss_gradients(view, batches, layer_weights)
    return [
        _sum(weight.detach().double() * gradient[name] for name, weight in weights.items())
        for weights, gradient in zip(map(layer_weights, view.layers), gradients, strict=True)
    ]


def magnitudes(view: DecoderView) -> list[float]:
    """Sum of ``|w|`` over all weights of each layer, norm gains included, biases not."""
    return [
        _sum(weight.detach() for weight in layer_weights(layer).values()) for layer in view.layers
    ]


def _sum(terms: Iterable[Tensor]) -> float:
    """Sum of absolute values, in float64: half precision would lose most terms."""
    return sum(float(term.double().abs().sum()) for term in terms)
