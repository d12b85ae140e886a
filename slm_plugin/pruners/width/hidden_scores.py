"""Scores of the channels of the residual stream: one ranking for the whole model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from slm_plugin.calibration.components import stream_components
from slm_plugin.lazy import torch
from slm_plugin.models.dimensions import BasisOf
from slm_plugin.models.families.family import Family
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import KeepHidden, Operation, RotateHidden
from slm_plugin.pruners.gradients import gradients_of
from slm_plugin.pruners.input_sums import InputSums, layer_inputs
from slm_plugin.pruners.width.importance import kept_units, rounded
from slm_plugin.surgery.hidden import coupled

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session


class StreamPlan(NamedTuple):
    """What a plan holds on the residual stream.

    Attributes:
        operations: What removes hidden channels.
        scores: The scores of all hidden channels; None where none go.
    """

    operations: Sequence[Operation] = ()
    scores: tuple[float, ...] | None = None


def stream_plan(score: str, session: Session, removed: int) -> StreamPlan:
    """The operations that remove hidden channels, and the scores of all of them.

    Args:
        score: One of `HIDDEN_SCORES` or `ROTATIONS`.
        session: The session.
        removed: The number of channels to remove.

    Raises:
        CalibrationError: There is no calibration set, and the score needs one.
        NumericalError: The loss or a score is NaN or infinite.
    """
    if not removed:
        return StreamPlan()
    per = ROTATIONS.get(score)
    if per is None:
        scores = hidden_scores(score, session)
        return StreamPlan([KeepHidden(indices=kept_units(scores, removed))], scores)
    kept = session.view.embedding.embedding_dim - removed
    shares, _ = stream_components(session.view, session.captured(), per, kept)
    turned = RotateHidden(calibration=str(session.digest), per=per)
    # The components come in the order of their shares.
    return StreamPlan([turned, KeepHidden(indices=tuple(range(kept)))], rounded(shares, None))


def hidden_scores(score: str, session: Session) -> tuple[float, ...]:
    """Scores of all hidden channels for a plan; the lowest go first.

    Args:
        score: One of `HIDDEN_SCORES`.
        session: The session.

    Raises:
        CalibrationError: There is no calibration set, and the score needs one.
        NumericalError: The loss or a score is NaN or infinite.
    """
    return rounded(HIDDEN_SCORES[score](session), None)


def activation(session: Session) -> Tensor:
    """Sum over the norms before all blocks of the root of their outputs' sums, ``(hidden,)``.

    For each norm it is the root of the sum over samples of the squared mean over tokens of ``|y|``,
    with y what the norm puts out: the input of q, k and v, or of gate and up.

    Source: Muralidharan et al. 2024, Minitron (arXiv 2407.14679), section 3.1, mean over the
        sequence and L2 norm over the batch, summed over the norms as in the released code.
    """
    readers = [_reader(session.view.family, part) for part in ("q_proj", "gate_proj")]
    found = [
        InputSums(inputs.read_by(name)).sample_means.sqrt()
        for inputs in layer_inputs(session)
        for name in readers
    ]
    return torch.stack(found).sum(0)


def magnitude(session: Session) -> Tensor:
    """Sum of ``w**2`` over all weights that go with a channel, without biases, ``(hidden,)``.

    Source: Li et al. 2017 (arXiv 1608.08710), section 3.1, over the coupled group of Fang et al.
        2023 (arXiv 2301.12900), section 3.3.
    """
    return _per_channel(session.view, lambda weight: weight.detach().float().square())


def taylor(session: Session) -> Tensor:
    """Sum of ``|w * dL/dw|`` over all weights of a channel, without biases, ``(hidden,)``.

    Source: Ma et al. 2023, LLM-Pruner (arXiv 2305.11627), section 3.2, element-wise importance of
        first order, over the group that it calls channel-wise.
    """
    view = session.view
    weights = {str(id(weight)): weight for weight, _ in _weights(view)}
    (gradients,) = gradients_of(view, session.batches(), [weights])
    return _per_channel(
        view, lambda weight: (weight.detach() * gradients[str(id(weight))]).float().abs()
    )


HIDDEN_SCORES: dict[str, Callable[[Session], Tensor]] = {
    "activation": activation,
    "magnitude": magnitude,
    "taylor": taylor,
}
# By principal components, the shares of which are the scores: what has a basis of its own.
ROTATIONS: dict[str, BasisOf] = {"pca": "model", "pca_per_block": "block"}


def _reader(family: Family, part: str) -> str:
    """Short name of the matrix that has the rows of a projection."""
    return next(name for name in family.projections if part in family.parts(name))


def _weights(view: DecoderView) -> list[tuple[Tensor, int]]:
    """All weights that lose something with a hidden channel, each with the axis of the channels."""
    return [(one.parameter, one.axis) for one in coupled(view) if one.name == "weight"]


def _per_channel(view: DecoderView, salience: Callable[[Tensor], Tensor]) -> Tensor:
    found = []
    for weight, axis in _weights(view):
        each = salience(weight).movedim(axis, 0)
        found.append(each.reshape(len(each), -1).sum(1).cpu())
    return torch.stack(found).sum(0)
