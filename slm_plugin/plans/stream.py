"""What the operations of a plan do to the residual stream, taken together."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from slm_plugin.errors import PlanError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.plans.operations import KeepHidden, Operation, RotateHidden


class StreamChange(NamedTuple):
    """What a plan does to the residual stream.

    Attributes:
        kept: Hidden channels to keep, ascending; None for all.
        rotation: The rotation before that; None for none.
    """

    kept: tuple[int, ...] | None = None
    rotation: RotateHidden | None = None

    def __bool__(self) -> bool:
        return self != (None, None)

    def check(self, before: Dimensions) -> None:
        """Check that the family and the channels allow it.

        Raises:
            PlanError: They do not.
        """
        if self.rotation is not None:
            self.rotation.check(before)
        if self.kept is None:
            return
        KeepHidden(indices=self.kept).check(before)
        in_blocks = self.rotation is not None and self.rotation.per == "block"
        if in_blocks and self.kept != tuple(range(len(self.kept))):
            # The basis of a block follows from what the blocks below it keep.
            raise PlanError(
                "the plan rotates every block and keeps other hidden channels than the first ones",
                hint="let keep_hidden name 0, 1, 2 and so on: they are the leading components",
            )

    def after(self, before: Dimensions) -> Dimensions:
        """Dimensions of the result; a rotation unties the head, and may add operators."""
        removed = 0 if self.kept is None else before.hidden_size - len(self.kept)
        per = None if self.rotation is None else self.rotation.per
        return before.without_hidden(removed, rotated=per)


UNCHANGED = StreamChange()


def stream_change(operations: Iterable[Operation]) -> StreamChange:
    """What operations do to the residual stream; false where nothing.

    Raises:
        PlanError: Two of them do the same.
    """
    kept = [operation for operation in operations if isinstance(operation, KeepHidden)]
    turned = [operation for operation in operations if isinstance(operation, RotateHidden)]
    if len(kept) > 1 or len(turned) > 1:
        name = "keep_hidden" if len(kept) > 1 else "rotate_hidden"
        raise PlanError(
            f"the plan has {name} {max(len(kept), len(turned))} times",
            hint="give it once: it is for the whole model",
        )
    return StreamChange(
        tuple(sorted(kept[0].indices)) if kept else None, turned[0] if turned else None
    )
