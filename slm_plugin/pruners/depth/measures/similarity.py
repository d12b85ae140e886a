"""Compare pruned models with the original one on the captured calibration set."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from slm_plugin.errors import NumericalError
from slm_plugin.lazy import inference_mode, torch
from slm_plugin.pruners.depth.measures.criteria import CRITERIA, NO_HEAD, CriterionName, Prepared

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.calibration.captures import Batch
    from slm_plugin.models.view import DecoderView


class Similarity:
    """A criterion with what it needs of the original model.

    Attributes:
        pooled: All samples are one part; else every captured batch is one.
        parts: Number of parts.
        greatest: Upper bound of all values.
        same: Value of the unchanged model.

    Args:
        view: The original model.
        captured: What was captured of it.
        criterion: Name of one of `criteria.CRITERIA`.
    """

    def __init__(
        self, view: DecoderView, captured: Sequence[Batch], criterion: CriterionName
    ) -> None:
        self._criterion = CRITERIA[criterion]
        self._head = view.logits if self._criterion.logits else NO_HEAD
        self._samples = sum(len(batch.tokens) for batch in captured)
        self.pooled, self.same = self._criterion.pooled, self._criterion.same
        self._prepared = self._references(captured)
        self.parts = len(self._prepared)
        self.greatest = max(self._criterion.greatest(prepared) for prepared in self._prepared)

    @inference_mode
    def _references(self, captured: Sequence[Batch]) -> list[Prepared]:
        """The criterion's data of the original model, of every part."""
        prepare = self._criterion.prepare
        if self.pooled:
            final = torch.cat([batch.final for batch in captured])
            tokens = torch.cat([batch.tokens for batch in captured])
            return [prepare(final, tokens, self._head, None)]
        return [prepare(one.final, one.tokens, self._head, one.valid) for one in captured]

    @inference_mode
    def values(self, part: int, final: Tensor) -> list[float]:
        """The value of every sample of a part; of all together where they are pooled.

        Args:
            part: Which one.
            final: Its hidden states behind the final norm in the pruned model,
                ``(samples, length, hidden)``.

        Raises:
            NumericalError: A value is NaN.
        """
        values = self._criterion.compare(self._prepared[part], final, self._head)
        if not torch.isfinite(values).all():
            raise NumericalError(
                "the similarity of a trial is NaN",
                hint="load the model in float32 or bfloat16: float16 overflows",
            )
        found: list[float] = values.reshape(-1).tolist()
        return found

    def is_below(self, seen: Sequence[float], bound: float | None) -> bool:
        """Whether the mean is below a bound even if all other samples have the greatest value.

        Args:
            seen: Values of the first samples.
            bound: The bound; None for none.
        """
        if bound is None:
            return False
        remaining = self._samples - len(seen)
        # The margin allows for rounding: sums in another order differ in their last digits.
        return (sum(seen) + remaining * self.greatest) / self._samples < bound - 1e-9
