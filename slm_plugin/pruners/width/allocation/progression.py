"""Relative sparsity that grows with depth as an arithmetic progression (ATP)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from slm_plugin.calibration.captures import split
from slm_plugin.calibration.held_out import is_held_out
from slm_plugin.errors import CalibrationError, NumericalError
from slm_plugin.lazy import inference_mode, torch
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import UnitScores
from slm_plugin.pruners.width.importance import kept_units
from slm_plugin.pruners.width.masking import masked

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session

# Slopes to try, from 0 (uniform) to the largest that leaves every sparsity in 0..1.
SLOPES = 9


def atp(
    session: Session,
    sparsity: float,
    score: Callable[[Session], Sequence[UnitScores]],
    kept: Callable[[Sequence[float]], Sequence[int]],
) -> list[float]:
    """Relative sparsity ``s_i / S`` with ``s_i = S + beta * (i - (layers - 1) / 2)``.

    Every slope beta is tried on the held-out calibration samples (every fifth): the channels that
    it removes are set to zero, and the slope with the least loss wins. The scores that choose the
    channels see the other samples alone. Heads stay in place during the search.

    Args:
        session: The session.
        sparsity: S, the mean sparsity.
        score: Scores the units on the calibration set of a session.
        kept: Returns the channels that layers keep for relative sparsities.

    Raises:
        CalibrationError: There are fewer than 2 samples.
        NumericalError: The loss or a score is NaN or infinite.

    Source: Huang et al. 2025, ATP (arXiv 2502.14770), section 3. The released code chooses beta by
        the perplexity of the WikiText-2 test text, in steps of 0.002 from 0.002 on.
    """
    if session.calibration is None or session.samples < 2:
        raise CalibrationError(
            f"allocation atp holds samples out to choose its slope; the set has {session.samples}",
            hint="give 2 calibration samples or more",
        )
    held_out = is_held_out(torch.arange(session.samples))
    fitted = type(session)(
        session.model,
        calibration=session.calibration[~held_out],
        seed=session.seed,
        batch_tokens=session.batch_tokens,
    )
    scores = [one for one in score(fitted) if one.unit == "mlp_channel"]
    unseen = list(split(session.calibration[held_out], session.batch_tokens))

    def loss(slope: float) -> float:
        counts = kept(progression(slope, sparsity, len(scores)))
        units = [
            kept_units(one.scores, len(one.scores) - count)
            for one, count in zip(scores, counts, strict=True)
        ]
        with silenced(session.view, units):
            return mean_loss(session.view, unseen)

    return progression(min(slopes(sparsity, len(scores)), key=loss), sparsity, len(scores))


def progression(slope: float, sparsity: float, layers: int) -> list[float]:
    """Sparsities of layers relative to their mean, which is ``sparsity``."""
    return [1 + slope / sparsity * (index - (layers - 1) / 2) for index in range(layers)]


def slopes(sparsity: float, layers: int) -> list[float]:
    """Slopes to try; with the last, one layer loses nothing or one loses everything."""
    if layers < 2:
        return [0.0]
    largest = 2 * min(sparsity, 1 - sparsity) / (layers - 1)
    return [largest * step / (SLOPES - 1) for step in range(SLOPES)]


def silenced(view: DecoderView, kept: Sequence[Sequence[int]]) -> AbstractContextManager[None]:
    """Set all MLP channels but some of every layer to zero during a block."""
    readers = [view.projections(layer)["down_proj"] for layer in view.layers]
    masks = [torch.zeros(reader.in_features) for reader in readers]
    for mask, units in zip(masks, kept, strict=True):
        mask[list(units)] = 1
    return masked(readers, masks)


@inference_mode
def mean_loss(view: DecoderView, batches: Sequence[Tensor]) -> float:
    """Mean next-token cross-entropy over batches of samples of one length.

    Raises:
        NumericalError: It is NaN or infinite.
    """
    total, samples = 0.0, 0
    for tokens in batches:
        given = tokens.to(view.model.device)
        total += float(view.model(**view.inputs(given), labels=given).loss) * len(tokens)
        samples += len(tokens)
    if not abs(total) < float("inf"):
        raise NumericalError(
            f"the loss on the held-out samples is {total / samples:g}",
            hint="load the model in float32 or bfloat16",
        )
    return total / samples
