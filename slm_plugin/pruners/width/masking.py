"""Units that are silent for a while: masks on the inputs of the projections that read them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def masked(readers: Sequence[nn.Module], masks: Sequence[Tensor]) -> Iterator[None]:
    """Multiply the inputs of projections by factors while the context is open.

    Args:
        readers: The projections that read the units.
        masks: For each of them a factor per unit, ``(units,)``; a unit's columns are consecutive.
    """

    def multiply(module: nn.Module, inputs: tuple[Tensor], *, mask: Tensor) -> Tensor:
        columns = inputs[0].shape[-1] // len(mask)
        return inputs[0] * mask.to(inputs[0]).repeat_interleave(columns)

    with ExitStack() as stack:
        for reader, mask in zip(readers, masks, strict=True):
            stack.callback(reader.register_forward_pre_hook(partial(multiply, mask=mask)).remove)
        yield
