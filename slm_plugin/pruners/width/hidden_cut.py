"""Hidden channels to remove, as the part of a cut that concerns the whole model."""

from __future__ import annotations

from dataclasses import dataclass

from slm_plugin.errors import TargetError
from slm_plugin.models.dimensions import BasisOf, Dimensions
from slm_plugin.target import Target


@dataclass(frozen=True, slots=True)
class HiddenCut:
    """Hidden channels to remove.

    Attributes:
        count: Their number.
        rotated: The residual stream is rotated before, which unties the head: by one basis, or by
            one for every block, which needs operators.
    """

    count: int = 0
    rotated: BasisOf | None = None

    def after(self, before: Dimensions) -> Dimensions:
        """What is left of a decoder."""
        return before.without_hidden(self.count, rotated=self.rotated)

    def narrowed(self, wanted: int, target: Target, current: Dimensions) -> tuple[Dimensions, int]:
        """What is left of a decoder, and how many of the wanted parameters are still to remove.

        Raises:
            TargetError: No channel would be left, or more parameters go than wanted.
        """
        if not self.count:
            return current, wanted
        if self.count >= current.hidden_size:
            raise TargetError(
                f"hidden_channels {self.count} leaves none: the model has {current.hidden_size}",
                hint=f"at most {current.hidden_size - 1} can be removed",
            )
        left = self.after(current)
        taken = current.parameters - left.parameters
        if taken > wanted:
            raise TargetError(
                f"hidden_channels {self.count} alone removes {taken:,} parameters, more than the "
                f"{wanted:,} of the target ({target.describe()})",
                hint="remove fewer of them, or ask for more",
            )
        return left, wanted - taken


NO_HIDDEN = HiddenCut()
