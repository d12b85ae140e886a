"""KL divergence of a changed model from the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from slm_plugin.errors import NumericalError
from slm_plugin.lazy import no_grad, torch
from slm_plugin.pruners.depth.measures.criteria import negative_divergence, prepare_divergence

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.models.head import Head


class Divergence:
    """KL(model || changed model) of the next-token distributions, in nats a token.

    Where the model predicts its text as well as its probabilities say, that is the expected
    increase of the cross-entropy. Unlike the measured increase it has no part that depends on which
    token came next, and so less noise from few samples. What is held of the model is a vector and
    an entropy for every token, no distribution.

    Args:
        final: Hidden states behind the final norm of the model, ``(samples, length, hidden)``, of
            every batch.
        head: The head.
    """

    @no_grad
    def __init__(self, final: Iterable[Tensor], head: Head) -> None:
        self._head = head
        self._prepared = [prepare_divergence(hidden, head) for hidden in final]

    @no_grad
    def samples(self, final: Iterable[Tensor]) -> list[float]:
        """The mean over the tokens of every sample.

        Args:
            final: Those states of the changed model, of the same batches.

        Raises:
            NumericalError: A divergence is NaN or infinite.
        """
        pairs = zip(self._prepared, final, strict=True)
        found = torch.cat([-negative_divergence(one, hidden, self._head) for one, hidden in pairs])
        if not torch.isfinite(found).all():
            raise NumericalError(
                "the divergence of a trial is NaN or infinite",
                hint="load the model in float32 or bfloat16: float16 overflows",
            )
        # Rounding may take the divergence of equal models below 0.
        kept: list[float] = found.clamp(min=0).tolist()
        return kept
