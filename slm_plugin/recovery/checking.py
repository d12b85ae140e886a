"""Check that a recovery changed nothing but the values of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from slm_plugin.errors import TELL_ITS_AUTHOR, ContractError, NumericalError
from slm_plugin.lazy import torch
from slm_plugin.models.state import WEIGHT, State, changes, in_words, without_operators
from slm_plugin.models.streaming import is_stub

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from slm_plugin.recovery.base import Recovery


def check_repaired(
    recovery: Recovery,
    model: PreTrainedModel,
    repaired: PreTrainedModel,
    before: State,
    state: Callable[[], State],
) -> None:
    """Check that a recovery kept its contract.

    Args:
        recovery: The recovery.
        model: The model before the recovery.
        repaired: The session's model after the recovery.
        before: The state of the session before the recovery.
        state: Returns the present state of the session.

    Raises:
        ContractError: It changed something other than the values of weights and the operators
            that it declares.
        NumericalError: It left NaN or infinity in a weight.
    """
    name = getattr(recovery, "name", type(recovery).__name__)
    if type(repaired) is not type(model):
        raise ContractError(
            f"'{name}' left a {type(repaired).__name__} in place of the model", hint=TELL_ITS_AUTHOR
        )
    after = state()
    if recovery.operators:
        before, after = without_operators(before), without_operators(after)
    found = changes(before, after)
    beyond = [key for key in found if key[0] != WEIGHT]
    if beyond:
        raise ContractError(
            f"'{name}' changed more than the values of weights: {in_words(beyond)}",
            hint=TELL_ITS_AUTHOR,
        )
    written = {weight for kind, weight in found if kind == WEIGHT}
    for weight, parameter in repaired.named_parameters():
        if weight in written and not is_stub(parameter):
            _refuse_non_finite(parameter, weight, name)


def _refuse_non_finite(parameter: Tensor, name: str, recovery: str) -> None:
    # A sum needs one pass and no copy; a finite sum has finite terms.
    if torch.isfinite(parameter.detach().sum(dtype=torch.float32)):
        return
    if not torch.isfinite(parameter).all():
        raise NumericalError(
            f"'{recovery}' left NaN or infinity in {name}",
            hint="load the model in float32 or bfloat16, or repair with smaller steps",
        )
