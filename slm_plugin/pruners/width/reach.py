"""What sizes a target can reach, and the errors that name them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from slm_plugin.errors import TargetError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.pruners.width.heads import head_parameters
from slm_plugin.target import Target


def sizes(current: Dimensions, multiple_of: int) -> list[int]:
    """Possible remaining intermediate sizes, largest first."""
    whole = range(multiple_of, current.intermediate_size, multiple_of)
    return [current.intermediate_size, *reversed(whole)]


@dataclass(frozen=True, slots=True)
class Reach:
    """Errors for unreachable targets, with the reachable range."""

    target: Target
    original: Dimensions
    current: Dimensions
    multiple_of: int
    taken: int = 0

    def too_far(self, wanted: int, kv_groups: int, query_heads: int) -> TargetError:
        """The target is above what the MLP has, or below what the heads alone remove."""
        heads = head_parameters(kv_groups, query_heads, self.current)
        noun = "query heads" if query_heads else "KV groups"
        if heads * self.current.layers > wanted:
            option = f"query_heads {query_heads}" if query_heads else f"kv_groups {kv_groups}"
            removed = f"{option} alone removes"
            if self.taken:
                removed = f"{option} and the hidden channels remove"
            return TargetError(
                f"{removed} {self._said(heads)}, more than the target ({self.target.describe()})",
                hint=f"remove fewer {noun} or ask for more",
            )
        channels = self.current.intermediate_size - sizes(self.current, self.multiple_of)[-1]
        most = heads + channels * self.current.channel_parameters
        removed = f"{kv_groups} of {self.current.kv_heads} {noun}"
        if query_heads:
            removed = f"{query_heads} of {self.current.queries_per_group} {noun} of each KV group"
        return TargetError(
            f"the target ({self.target.describe()}) is out of reach of width pruning",
            hint=f"with {removed} removed at most {self._said(most)}",
        )

    def too_little(self) -> TargetError:
        """The target is less than half of the smallest step."""
        first, second = sizes(self.current, self.multiple_of)[:2]
        step = (first - second) * self.current.channel_parameters
        return TargetError(
            f"the target ({self.target.describe()}) is less than half of the smallest step",
            hint=f"one step is {self._said(step)}: ask for that or more, or choose a smaller "
            "multiple_of",
        )

    def _said(self, per_layer: int) -> str:
        return amount(self.target, self.original, self.current, per_layer, self.taken)


def amount(
    target: Target, original: Dimensions, current: Dimensions, per_layer: int, taken: int = 0
) -> str:
    """A number of parameters of every layer, as a ratio and as what is left.

    ``current`` is the model without its removed hidden channels, which had ``taken`` parameters.
    """
    whole = per_layer * current.layers
    base = current.parameters + taken if target.of == "current" else original.parameters
    # Rounded down, so that the named ratio is reachable.
    ratio = math.floor((whole + taken) / base * 1000) / 1000
    return f"ratio {ratio:.3f} ({current.parameters - whole:,} parameters left)"
