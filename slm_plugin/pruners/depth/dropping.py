"""Base classes of strategies that drop whole layers, and the choice by score."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from slm_plugin.component import Options
from slm_plugin.counts import Natural
from slm_plugin.errors import NumericalError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.models.view import DecoderView
from slm_plugin.plans import DropLayers
from slm_plugin.pruners import base

if TYPE_CHECKING:
    from slm_plugin.session import Session


class LayerDropping(base.Pruner):
    """A strategy that drops whole layers until a size is reached."""

    kind: ClassVar = "depth"
    targets: ClassVar = ("layers_removed", "ratio", "parameters")

    @abstractmethod
    def eligible(self, layers: int) -> Sequence[int]:
        """Indices of the layers that may be removed, ascending, for a number of layers."""

    @property
    @abstractmethod
    def protection(self) -> str:
        """Description of the protected layers."""

    def removable(self, view: DecoderView, positions: int | None = None) -> list[int]:
        """Indices of the layers of a model that may be removed, ascending.

        Args:
            view: The model.
            positions: Number of positions that are scored, where not every layer is one.
        """
        layers = len(view.layers) if positions is None else positions
        return [index for index in self.eligible(layers) if index >= view.fixed_layers]

    def most_removable(self, current: Dimensions) -> int:
        """Number of layers that may be removed."""
        return sum(index >= current.fixed_layers for index in self.eligible(current.layers))

    def describe_protection(self, current: Dimensions) -> str:
        """Description of all protected layers, for messages."""
        return base.with_fixed_layers(self.protection, current.fixed_layers)

    def check_target(self, original: Dimensions, current: Dimensions) -> None:
        """Check that the protected layers leave enough to remove."""
        wanted = base.layers_to_remove(self.target, original, current)
        most = min(self.most_removable(current), current.layers - 1)
        protection = self.describe_protection(current)
        base.refuse_beyond(self.target, wanted, most, current.layers, protection)

    def wanted(self, session: Session) -> int:
        """Number of layers to drop.

        Raises:
            TargetError: The target cannot be reached.
        """
        current = session.view.dimensions()
        self.check_target(session.original, current)
        return base.layers_to_remove(self.target, session.original, current)


class EndsOptions(Options):
    """Protected layers at both ends."""

    protect_first: Annotated[Natural, Field(description="lowest layers to protect")] = 0
    protect_last: Annotated[Natural, Field(description="highest layers to protect")] = 0


class BetweenEnds(LayerDropping):
    """A strategy that may drop any layer between protected ends."""

    Options: ClassVar = EndsOptions
    options: EndsOptions

    def eligible(self, layers: int) -> range:
        """Layers between the protected ones."""
        return range(self.options.protect_first, layers - self.options.protect_last)

    @property
    def protection(self) -> str:
        """The two protection options."""
        options = self.options
        return f"protect_first {options.protect_first} and protect_last {options.protect_last}"


def lowest(scores: Sequence[float], wanted: int, eligible: Collection[int]) -> list[int]:
    """The layers with the lowest scores, lowest first; ties by index.

    Raises:
        NumericalError: A score is NaN or infinite, so that scores cannot be ranked.
    """
    for index, score in enumerate(scores):
        if not math.isfinite(score):
            raise NumericalError(
                f"the score of layer {index} is {score}",
                hint="check the model's weights, or load it in float32 or bfloat16",
            )
    return sorted(eligible, key=lambda index: (scores[index], index))[:wanted]


def one_by_one(indices: Sequence[int]) -> list[DropLayers]:
    """One operation per layer, so that a plan can be truncated."""
    return [DropLayers(indices=(index,)) for index in indices]
