"""What a recovery may change, which is the values of weights, and how anything else is found."""

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
    """Hold a recovery to its contract.

    Args:
        recovery: The recovery.
        model: The model that it was given.
        repaired: The session's model behind it.
        before: The state of the session before it.
        state: Gives the state of the session now.

    Raises:
        ContractError: It changed more than the values of weights, and the operators that it
            declares.
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
    # A sum is a pass without a copy; one that is finite has finite terms.
    if torch.isfinite(parameter.detach().sum(dtype=torch.float32)):
        return
    if not torch.isfinite(parameter).all():
        raise NumericalError(
            f"'{recovery}' left NaN or infinity in {name}",
            hint="load the model in float32 or bfloat16, or repair with smaller steps",
        )
