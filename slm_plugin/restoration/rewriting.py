"""Write weights, and restore them when a recovery fails."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from slm_plugin.calibration.spool import Spool
from slm_plugin.errors import NumericalError
from slm_plugin.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Write: TypeAlias = "Callable[[Tensor, Tensor], None]"


@contextmanager
def rewriting() -> Iterator[Write]:
    """Yield a function that writes values into a parameter, in the parameter's number format.

    The former values are stored on disk and restored on any exception.

    Raises:
        NumericalError: A value is NaN or does not fit the number format.
    """
    written: list[Tensor] = []
    former = Spool()

    def write(parameter: Tensor, values: Tensor) -> None:
        fresh = values.to(parameter.device, parameter.dtype)
        if not torch.isfinite(fresh).all():
            raise NumericalError(
                f"a repaired weight is NaN or does not fit {str(parameter.dtype)[6:]}",
                hint="load the model in float32 or bfloat16",
            )
        former.append(parameter)
        written.append(parameter)
        parameter.data.copy_(fresh)

    try:
        yield write
    except BaseException:
        for index in reversed(range(len(written))):
            written[index].data.copy_(former[index])
        raise
