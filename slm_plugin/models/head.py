"""The language-modelling head on many positions, without holding all logits at once."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_plugin.lazy import F, torch
from slm_plugin.models.streaming import held

if TYPE_CHECKING:
    from torch import Tensor, nn

# A quarter of a thousand positions times a vocabulary of 50,000 is 50 MB of float32 logits.
POSITIONS = 256


@dataclass(frozen=True, slots=True)
class Head:
    """What turns hidden states into logits.

    Attributes:
        linear: The language-modelling head.
        divisor: Its output is divided by this (Granite).
        softcap: The bound c of ``c * tanh(logits / c)`` (Gemma 2); None for none.
    """

    linear: nn.Linear
    divisor: float = 1.0
    softcap: float | None = None

    def __call__(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, ``(..., hidden)`` to ``(..., vocabulary)``."""
        logits: Tensor = self.linear(hidden)
        if self.divisor != 1.0:
            logits = logits / self.divisor
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def logits_of(head: Head, hidden: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield slices of positions with their logits in float32.

    Args:
        head: The language-modelling head.
        hidden: Hidden states after the final norm, ``(positions, hidden)``.

    Yields:
        A slice of the positions, and its logits, ``(slice, vocabulary)``.
    """
    with held(head.linear):
        for start in range(0, len(hidden), POSITIONS):
            stretch = slice(start, start + POSITIONS)
            yield stretch, head(hidden[stretch]).float()


def next_token_losses(head: Head, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Cross-entropy of every token but the first of each sample, given those before it.

    Args:
        head: The language-modelling head.
        hidden: Hidden states after the final norm, ``(samples, length, hidden)``.
        tokens: Token ids, ``(samples, length)``.

    Returns:
        Losses in nats, float64, ``(samples, length - 1)``: none for samples of one token.
    """
    states, targets = hidden[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()
    if not len(targets):
        return torch.empty((len(tokens), 0), dtype=torch.float64)
    losses = [
        F.cross_entropy(logits, targets[stretch], reduction="none").cpu().double()
        for stretch, logits in logits_of(head, states)
    ]
    return torch.cat(losses).view(len(tokens), -1)
