"""Repair of gaps by scaling the rotated channels of the residual stream with an operator.

Source: LinearPatch (arXiv 2505.24680), without the optional distillation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, ClassVar

from slm_plugin.calibration.captures import in_float64
from slm_plugin.errors import NumericalError
from slm_plugin.lazy import no_grad, torch
from slm_plugin.recovery.base import Recovery, RecoveryRecord
from slm_plugin.recovery.closed_form.operators import put_operators
from slm_plugin.registry import register_recovery
from slm_plugin.restoration.layer_walk import LayerBatch
from slm_plugin.restoration.least_squares import share

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session


@register_recovery("linear_patch")
class LinearPatch(Recovery):
    """Restore the magnitude of the rotated channels of the residual stream after every gap.

    With X the stream after the gap, X* that of the dense model there and H an orthonormal
    Hadamard matrix, the operator is P = H D H', where D_kk is the mean of |X* H| divided by the
    mean of |X H| in channel k. H spreads outlier channels over the others. A width that is no power
    of two uses blocks of the largest power of two that divides it.
    """

    reference: ClassVar[bool] = True
    operators: ClassVar[bool] = True

    @no_grad
    def recover(self, session: Session) -> RecoveryRecord:
        """Insert the operators.

        Raises:
            CalibrationError: The session has no reference.
            UnsupportedModelError: The residual stream and the reference differ in width, or the
                model has operators already.
            NumericalError: NaN or infinity, or a channel that is always zero; the model stays
                unchanged.
        """
        return put_operators(self, session, _patched)


def hadamard(width: int) -> Tensor:
    """Orthonormal Hadamard matrix, ``(width, width)`` in float64, by Sylvester's construction.

    For a width that is no power of two, a block diagonal of the largest possible such matrices.
    """
    block = torch.ones(1, 1, dtype=torch.float64)
    while width % (2 * len(block)) == 0:
        block = torch.cat([torch.cat([block, block], 1), torch.cat([block, -block], 1)])
    blocks = torch.eye(width // len(block), dtype=torch.float64)
    return torch.kron(blocks, block / math.sqrt(len(block)))


def _patched(batches: Callable[[], Iterable[LayerBatch]], where: str) -> tuple[Tensor | None, str]:
    sums: list[Tensor] = []
    rotation = torch.empty(0)
    for batch in batches():
        pair = torch.stack([in_float64(batch.output), in_float64(batch.target)]).flatten(1, 2)
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
        return None, "left as it is, the channels have their original magnitude"
    patch = rotation @ torch.diag(scale) @ rotation.T
    before, after = _errors(batches(), patch)
    span = f"channels times {float(scale.min()):.4g} to {float(scale.max()):.4g}"
    return patch, f"{span}, error {before:.2%} to {after:.2%}"


def _errors(batches: Iterable[LayerBatch], patch: Tensor) -> tuple[float, float]:
    """Relative error of the stream without and with the patch.

    Each scale is a mean over all tokens, so no sample is held out.
    """
    plain = patched = norm = 0.0
    for batch in batches:
        state, target = in_float64(batch.output), in_float64(batch.target)
        plain += float((target - state).square().sum())
        patched += float((target - state @ patch).square().sum())
        norm += float(target.square().sum())
    return share(plain, norm), share(patched, norm)
