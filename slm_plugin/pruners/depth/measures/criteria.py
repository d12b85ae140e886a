"""Criteria of depth strategies: similarity of a pruned model to the original one.

A criterion compares hidden states after the final norm. Greater values mean more similar models.
Every criterion has an upper bound, so that a search can stop a trial early.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias, cast

from slm_plugin.calibration.frames import mean_over, silenced
from slm_plugin.errors import TargetError
from slm_plugin.lazy import torch
from slm_plugin.models.head import Head, logits_of, next_token_losses
from slm_plugin.models.streaming import values
from slm_plugin.pruners.depth.measures.cka import Estimator, gram, gram_cka

if TYPE_CHECKING:
    from torch import Tensor, nn

# Bound on the loss, in nats per token, for the check of thresholds.
MOST_NATS = 1000.0
Prepared: TypeAlias = "tuple[Tensor, ...]"
CriterionName = Literal["flat_cosine", "token_cosine", "cka", "cka_unbiased", "logit_kl", "loss"]


@dataclass(frozen=True, slots=True)
class Criterion:
    """One way to compare two models on the same samples.

    Attributes:
        meaning: What the value is, with its unit.
        same: Value of the unchanged model.
        prepare: From the original's final hidden state ``(samples, length, hidden)``, the token
            ids ``(samples, length)``, the head, and the positions that count ``(samples, length)``,
            None for all, what `compare` needs; called once.
        compare: From that and the pruned model's final hidden state, one value per sample,
            ``(samples,)`` in float64.
        greatest: Upper bound of the samples' values.
        possible: Lower and upper bound for any model.
        pooled: The value is computed on all samples together, not as a mean: `prepare` and
            `compare` receive all samples at once and `compare` returns one number.
        padded: It leaves out positions that do not count; others are refused for padded samples.
        logits: It computes logits, so it needs a language-modelling head.
    """

    meaning: str
    same: float
    prepare: Callable[..., Prepared]
    compare: Callable[[Prepared, Tensor, Head], Tensor]
    greatest: Callable[[Prepared], float]
    possible: tuple[float, float]
    pooled: bool = False
    padded: bool = False
    logits: bool = False


# For criteria that compute no logits.
NO_HEAD = Head(cast("nn.Linear", None))


def flat_cosine(reference: Tensor, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
    """Flattened cosine: the cosine of each sample's hidden states flattened to one vector.

    Args:
        reference: ``(samples, length, hidden)``.
        hidden: ``(samples, length, hidden)``.
        valid: Positions that count, ``(samples, length)``; None for all.

    Returns:
        One cosine per sample, ``(samples,)``, in float64.

    Source: released code of SLM (arXiv 2502.19159). Unlike a mean of per-token cosines it
    weights tokens by their norm.
    """
    return _cosine(silenced(reference, valid).flatten(1), silenced(hidden, valid).flatten(1))


def token_cosine(reference: Tensor, hidden: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over a sample's tokens of the cosine of their hidden states.

    Args:
        reference: ``(samples, length, hidden)``.
        hidden: ``(samples, length, hidden)``.
        valid: Positions that count, ``(samples, length)``; None for all.

    Returns:
        One mean per sample, ``(samples,)``, in float64.
    """
    return mean_over(_cosine(reference, hidden), valid)


def prepare_divergence(reference: Tensor, head: Head) -> Prepared:
    """What the divergence from the original needs, without storing a logit.

    With p the original's distribution and a linear head W, ``sum_v p_v (W h)_v`` is
    ``(sum_v p_v W_v) · h``: one vector per token replaces a distribution. Where the family bounds
    its logits, the head is not linear, and the original's logits are computed at every comparison.

    Args:
        reference: Final hidden state of the original, ``(samples, length, hidden)``.
        head: The head, without a bias.

    Returns:
        The expected rows of the head ``(samples, length, hidden)`` in float32, or the reference
        where the head is not linear, and the entropies in nats, ``(samples, length)`` in float64.
    """
    weight = values(head.linear.weight).float() / head.divisor
    means, entropies = [], []
    for _, logits in logits_of(head, reference.flatten(0, 1)):
        logs = logits.log_softmax(-1)
        share = logs.exp()
        if head.softcap is None:
            means.append(share @ weight)
        entropies.append(-(share * logs).sum(-1).double())
    return (
        torch.cat(means).view(reference.shape) if means else reference,
        torch.cat(entropies).view(reference.shape[:2]),
    )


def negative_divergence(prepared: Prepared, hidden: Tensor, head: Head) -> Tensor:
    """Minus KL(original || changed) of the next-token distributions, in nats per token.

    Args:
        prepared: From `prepare_divergence`.
        hidden: Final hidden state of the changed model, ``(samples, length, hidden)``.
        head: The head.

    Returns:
        One mean over its tokens per sample, ``(samples,)``, in float64.
    """
    reference, entropies = prepared
    spread, agreement = [], []
    for stretch, logits in logits_of(head, hidden.flatten(0, 1)):
        spread.append(logits.logsumexp(-1).double())
        if head.softcap is not None:
            share = head(reference.flatten(0, 1)[stretch]).float().softmax(-1)
            agreement.append((share.double() * logits.double()).sum(-1))
    agreed = torch.cat(agreement) if agreement else (reference.double() * hidden.double()).sum(-1)
    return (entropies + (agreed.flatten() - torch.cat(spread)).view(entropies.shape)).mean(-1)


def _cosine(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.double(), y.double()
    lengths = torch.linalg.vector_norm(x, dim=-1) * torch.linalg.vector_norm(y, dim=-1)
    cosine: Tensor = (x * y).sum(-1) / lengths
    return cosine


def _cka(estimator: Estimator) -> Criterion:
    def compare(prepared: Prepared, hidden: Tensor, head: Head) -> Tensor:
        return gram_cka(prepared[0], gram(hidden), estimator)

    return Criterion(
        meaning=f"{estimator} linear CKA over the samples",
        same=1.0,
        prepare=lambda reference, tokens, head, valid=None: (gram(reference),),
        compare=compare,
        greatest=lambda prepared: 1.0,
        # The unbiased estimator has no lower bound.
        possible=(0.0 if estimator == "biased" else -math.inf, 1.0),
        pooled=True,
    )


def _states(reference: Tensor, tokens: Tensor, head: Head, valid: Tensor | None = None) -> Prepared:
    return (reference,) if valid is None else (reference, valid)


CRITERIA: dict[CriterionName, Criterion] = {
    "flat_cosine": Criterion(
        meaning="flattened cosine of a sample's final hidden states",
        same=1.0,
        prepare=_states,
        compare=lambda prepared, hidden, head: flat_cosine(prepared[0], hidden, *prepared[1:]),
        greatest=lambda prepared: 1.0,
        possible=(-1.0, 1.0),
        padded=True,
    ),
    "token_cosine": Criterion(
        meaning="mean over tokens of the cosine of final hidden states",
        same=1.0,
        prepare=_states,
        compare=lambda prepared, hidden, head: token_cosine(prepared[0], hidden, *prepared[1:]),
        greatest=lambda prepared: 1.0,
        possible=(-1.0, 1.0),
        padded=True,
    ),
    "cka": _cka("biased"),
    "cka_unbiased": _cka("unbiased"),
    "logit_kl": Criterion(
        meaning="minus KL(original || changed), in nats per token",
        same=0.0,
        prepare=lambda reference, tokens, head, valid=None: prepare_divergence(reference, head),
        compare=negative_divergence,
        logits=True,
        greatest=lambda prepared: 0.0,
        possible=(-math.inf, 0.0),
    ),
    "loss": Criterion(
        meaning="minus the increase of the calibration loss, in nats per token",
        same=0.0,
        logits=True,
        prepare=lambda reference, tokens, head, valid=None: (
            next_token_losses(head, reference, tokens).mean(-1),
            tokens,
        ),
        compare=lambda prepared, hidden, head: (
            prepared[0] - next_token_losses(head, hidden, prepared[1]).mean(-1)
        ),
        # A loss cannot fall below 0.
        greatest=lambda prepared: float(prepared[0].max()),
        possible=(-MOST_NATS, MOST_NATS),
    ),
}


def refuse_threshold(threshold: float | None, name: CriterionName) -> None:
    """Check that a threshold is within the range of a criterion.

    Raises:
        TargetError: It is not.
    """
    low, high = CRITERIA[name].possible
    if threshold is None or low <= threshold <= high:
        return
    wanted = f"from {low:g} to {high:g}" if math.isfinite(low) else f"of at most {high:g}"
    raise TargetError(
        f"threshold {threshold:g} is outside the range of {name}", hint=f"give a threshold {wanted}"
    )
