"""Score each layer on what it sees in the model as pruned and restored below it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from slm_plugin.lazy import no_grad
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.streaming import held
from slm_plugin.plans import UnitScores
from slm_plugin.pruners.input_sums import LayerInputs
from slm_plugin.restoration.boundaries import dense_states
from slm_plugin.restoration.layer_walk import LayerWalk
from slm_plugin.restoration.refitting import refit_layer
from slm_plugin.restoration.rewriting import rewriting
from slm_plugin.surgery.channels import narrowed_copy

if TYPE_CHECKING:
    from slm_plugin.session import Session


@dataclass(frozen=True, slots=True)
class Restoration:
    """How each layer is restored once it is cut.

    Attributes:
        toward: The target of the fit; none leaves the layer as it is cut.
        o_proj: Refit the attention's output before ``down_proj``.
    """

    toward: Literal["dense", "own", "none"]
    o_proj: bool


@no_grad
def scored_in_turn(
    session: Session,
    after: Dimensions,
    restoration: Restoration,
    score: Callable[[LayerInputs], Sequence[UnitScores]],
    removed: Callable[[UnitScores], Mapping[str, Sequence[int]]],
) -> Iterator[UnitScores]:
    """Score the layers from the bottom up; a copy of each is cut and restored before the next.

    The model does not change. One layer is copied at a time.

    Args:
        session: The session.
        after: Dimensions that the model will have.
        restoration: How a cut layer is restored.
        score: Scores the units of one layer.
        removed: The units that go by their scores, by the name of their kind.

    Raises:
        CalibrationError: There is no calibration set, or it has fewer than 2 samples.
        NumericalError: The model produces NaN or infinity.

    Source: the order of ZipLM (arXiv 2302.04089) and SlimGPT (arXiv 2412.18110): the inputs of a
        layer are those that the compressed layers below it give.
    """
    view, before = session.view, session.view.dimensions()
    walk = _walk(session, restoration)
    for index, layer in enumerate(view.layers):
        with held(layer):
            sizes = (session.samples, walk.count)
            found = score(LayerInputs(index, layer, view.projections(layer), *sizes, walk.runs))
            yield from found
            if index + 1 == len(view.layers):
                return
            gone = {unit: part for units in found for unit, part in removed(units).items()}
            walk.replacement = narrowed_copy(
                layer, gone, before.of_layer(index), after.of_layer(index)
            )
            if restoration.toward != "none":
                with rewriting() as write:
                    refit_layer(walk.fitted, write, o_proj=restoration.o_proj)
            walk.advance()


def _walk(session: Session, restoration: Restoration) -> LayerWalk:
    """A walk beside the states that a recovery after this stage would have."""
    view = session.view
    former = list(view.layers) if restoration.toward == "own" else None
    return LayerWalk(view, *dense_states(session), former)
