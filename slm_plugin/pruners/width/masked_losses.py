"""Losses of the model with some units masked, and the probabilities that are learned from them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from slm_plugin.calibration.captures import Batch, run_batches
from slm_plugin.lazy import inference_mode, torch
from slm_plugin.models.head import next_token_losses
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import UnitScores
from slm_plugin.pruners.gradients import require_finite
from slm_plugin.pruners.trial_store import tell_read, trial_store
from slm_plugin.pruners.width.budget import Cut
from slm_plugin.pruners.width.heads import sections
from slm_plugin.pruners.width.importance import rounded, standardised
from slm_plugin.pruners.width.masking import masked
from slm_plugin.pruners.width.policy_gradient import Descent, learn

if TYPE_CHECKING:
    from torch import Tensor, nn

    from slm_plugin.session import Session

# The projection that reads the units of a kind.
READER = {"mlp_channel": "down_proj", "kv_group": "o_proj", "query_head": "o_proj"}
DIGITS = 9


def learned_scores(
    session: Session,
    start: Sequence[UnitScores],
    cut: Cut,
    descent: Descent,
) -> tuple[UnitScores, ...]:
    """The probabilities with which units stay, learned from losses of masked models.

    Each step evaluates its masks on one batch of the session; batches come in turn. Losses are
    stored as they are measured. A step depends on the former ones only by their losses, so an
    interrupted computation repeats the steps on the stored losses and continues exactly.

    Args:
        session: The session.
        start: A score of every unit that may go; see `initial`.
        cut: How many units of every layer will go.
        descent: How to learn.

    Returns:
        The probabilities, in the order of ``start``.

    Raises:
        CalibrationError: There is no calibration set.
        NumericalError: A loss is NaN or infinite.
        OutputError: The losses cannot be written.
    """
    view, batches = session.view, session.captured()
    parted = [(one, sections(one, view.dimensions().kv_heads)) for one in start]
    parts = [(part, len(part) - cut.removed(one)) for one, parts in parted for part in parts]
    keep = [number for _, number in parts]
    units = [len(one.scores) for one in start]
    readers = [view.projections(view.layers[one.layer])[READER[one.unit]] for one in start]
    what = [descent, keep, [one.model_dump_json() for one in start]]
    store = trial_store(session, what, "losses of masks", _is_loss)
    tell_read(session, len(store.items()), store)

    def loss(step: int, draw: int, mask: Tensor) -> float:
        found = store.find([step, draw])
        if found is None:
            batch = batches[step % len(batches)]
            found = masked_loss(view, batch, readers, torch.split(mask, units))
            store.store([step, draw], found)
        return float(found)

    first = torch.cat([initial(scores, number) for scores, number in parts])
    theta = learn(first, [len(scores) for scores, _ in parts], keep, loss, descent)
    return tuple(
        one.model_copy(update={"scores": rounded(part, one.layer, DIGITS)})
        for one, part in zip(start, torch.split(theta, units), strict=True)
    )


def initial(scores: Sequence[float], keep: int) -> Tensor:
    """Probabilities to start from: the sigmoid of the standardised scores, plus a constant.

    The constant makes their mean the share of units that stay; `policy_gradient.project` then
    brings them into 0..1.

    Args:
        scores: A score per unit; greater means more important.
        keep: Number of units that stay.

    Returns:
        ``(units,)``, float64.

    Source: the released code of arXiv 2406.10576, initialisation ``wanda-sp`` with ``sigmap``.
    """
    shares = standardised(scores).sigmoid()
    return shares + (keep / len(scores) - shares.mean())


@inference_mode
def masked_loss(
    view: DecoderView, batch: Batch, readers: Sequence[nn.Module], masks: Sequence[Tensor]
) -> float:
    """Mean next-token cross-entropy of the model with some units masked, in nats.

    Args:
        view: The model, whose weights stay as they are.
        batch: The samples.
        readers: The projections that read the units.
        masks: For each of them a factor per unit, ``(units,)``; a unit's columns are consecutive.

    Raises:
        NumericalError: The loss is NaN or infinite.
    """
    with masked(readers, masks):
        (hidden,) = run_batches(enumerate(view.layers), [batch], [batch.inputs[0]])
    loss = next_token_losses(view.logits, view.norm(hidden), batch.tokens).mean()
    require_finite(loss)
    return float(loss)


def _is_loss(key: Any, value: Any) -> bool:
    step, draw = key
    return isinstance(step, int) and isinstance(draw, int) and math.isfinite(float(value))
