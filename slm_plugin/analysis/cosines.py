"""Cosines between layers, token by token, summed over batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_plugin.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

# Tokens of all layers taken to float64 at a time.
_CHUNK = 128


class CosineSums:
    """Sums over tokens from which the mean cosine of every two states follows.

    Args:
        states: How many states there are: embedding and layer outputs.
        hidden: Size of a token's vector.
    """

    def __init__(self, states: int, hidden: int) -> None:
        self._same = torch.zeros(states, states, dtype=torch.float64)
        self._directions = torch.zeros(states, hidden, dtype=torch.float64)
        self._tokens = 0

    def add(self, states: Sequence[Tensor]) -> None:
        """Add the tokens of one batch.

        Args:
            states: Each ``(samples, length, hidden)``. A vector of zeros counts as cosine 0.
        """
        stacked = torch.stack([state.flatten(0, 1) for state in states])
        for part in torch.split(stacked, _CHUNK, dim=1):
            vectors = torch.nn.functional.normalize(part.double(), dim=-1)
            flat = vectors.flatten(1)
            self._same += flat @ flat.T
            self._directions += vectors.sum(1)
            self._tokens += vectors.shape[1]

    def same_token(self) -> Tensor:
        """Mean cosine of a token's vectors in two states, ``(states, states)``."""
        return self._same / self._tokens

    def other_token(self) -> Tensor:
        """Mean cosine over all pairs of different tokens, one in each state.

        Sums of unit vectors hold all pairs at once: their inner product counts every pair of
        tokens, those of the same token are taken out.
        """
        pairs = self._directions @ self._directions.T - self._same
        return pairs / (self._tokens * (self._tokens - 1))

    def block_influence(self) -> Tensor:
        """One minus the mean cosine of a layer's input and output, ``(states - 1,)``.

        Source: ShortGPT (arXiv 2403.03853), equation 1, with the output of the last layer before
        the final norm. Rounding may put a cosine above 1, never the influence below 0.
        """
        return (1 - self.same_token().diagonal(offset=1)).clamp_min(0)
