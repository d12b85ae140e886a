"""Repair of gaps by scaling the residual stream's channels, rotated: an operator of its own.

Source: LinearPatch (arXiv 2505.24680), without the distillation that may follow it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar

from slm_plugin.errors import NumericalError
from slm_plugin.lazy import no_grad, torch
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.recovery.closed_form.layer_walk import Sight
from slm_plugin.recovery.closed_form.least_squares import in_float64, share
from slm_plugin.recovery.closed_form.operators import put_operators
from slm_plugin.registry import register_recovery

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session


@register_recovery("linear_patch")
class LinearPatch(Recovery):
    """Give the rotated channels of the stream behind every gap the magnitude that they had.

    With X the stream behind the gap, X* what the dense model had there and H an orthonormal
    Hadamard matrix, the operator is P = H D H', where D_kk is the mean of |X* H| over that of
    |X H| in channel k. H spreads the few channels of massive values over the others. A width that
    is no power of two takes blocks of the largest one that divides it.
    """

    reference: ClassVar[bool] = True
    operators: ClassVar[bool] = True

    @no_grad
    def recover(self, session: Session) -> RecoveryRecord:
        """Put the operators there.

        Raises:
            CalibrationError: No reference was kept.
            UnsupportedModelError: The residual stream has another width than the reference's, or
                has operators already.
            NumericalError: NaN or infinity, or a channel that is always zero; the model stays as
                it was.
        """
        return put_operators(self, session, _patched)


def hadamard(width: int) -> Tensor:
    """Orthonormal Hadamard matrix, ``(width, width)`` in float64, by Sylvester's construction.

    For a width that is no power of two a block diagonal of such matrices, as large as can be.
    """
    block = torch.ones(1, 1, dtype=torch.float64)
    while width % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    blocks = torch.eye(width // len(block), dtype=torch.float64)
    return torch.kron(blocks, block / math.sqrt(len(block)))


def _patched(see: Callable[[], Iterable[Sight]], where: str) -> tuple[Tensor | None, str]:
    sums: list[Tensor] = []
    rotation = torch.empty(0)
    for sight in see():
        pair = torch.stack([in_float64(sight.output), in_float64(sight.target)]).flatten(1, 2)
        if not sums:
            rotation = hadamard(pair.shape[-1]).to(pair.device)
        sums.append((pair @ rotation).abs().sum(1))
    now, wanted = torch.stack(sums).sum(0)
    scale = wanted / now
    if not torch.isfinite(scale).all():
        raise NumericalError(
            f"the states behind {where} are NaN or infinite, or a channel of them is always zero",
            hint="load the model in float32 or bfloat16 and check its weights",
        )
    if bool((scale == 1).all()):
        return None, "left as it is, the channels have the magnitude that they had"
    patch = rotation @ torch.diag(scale) @ rotation.T
    before, after = _errors(see(), patch)
    span = f"channels times {float(scale.min()):.4g} to {float(scale.max()):.4g}"
    return patch, f"{span}, error {before:.2%} to {after:.2%}"


def _errors(sights: Iterable[Sight], patch: Tensor) -> tuple[float, float]:
    """What the stream lacks without and with the patch, as a share of the norm of what is wanted.

    The scales are means over all tokens, one a channel, so that nothing is held out.
    """
    plain = patched = norm = 0.0
    for sight in sights:
        state, target = in_float64(sight.output), in_float64(sight.target)
        plain += float((target - state).square().sum())
        patched += float((target - state @ patch).square().sum())
        norm += float(target.square().sum())
    return share(plain, norm), share(patched, norm)
