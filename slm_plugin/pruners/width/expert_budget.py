"""The number of experts to remove from every layer."""

from __future__ import annotations

from slm_plugin.errors import TargetError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.pruners.width.budget import wanted_parameters
from slm_plugin.pruners.width.reach import amount
from slm_plugin.target import Target


def experts_to_remove(target: Target, original: Dimensions, current: Dimensions) -> int:
    """The number of experts to remove from every layer that is nearest to a target.

    A layer keeps as many as its router chooses for each token.

    Args:
        target: A ratio or a number of parameters.
        original: Dimensions of the original model.
        current: Dimensions of the model before this stage.

    Raises:
        TargetError: The target is out of reach; the hint names the reachable range.
    """
    if not current.expert_parameters:
        raise TargetError(
            f"no expert can be removed: {current.architecture} is no mixture of experts",
            hint="`slm-plugin list --model` names what can be used",
        )
    wanted = wanted_parameters(target, original, current)
    most = current.experts - current.experts_per_token
    number = round(wanted / (current.layers * current.expert_parameters))
    if number > most:
        asked = f"the target ({target.describe()}) means {number} of {current.experts} experts"
        limit = f"the router chooses {current.experts_per_token} for each token"
        if most < 1:
            raise TargetError(f"no expert can be removed: {limit}, which are all")
        size = amount(target, original, current, most * current.expert_parameters)
        raise TargetError(f"{asked}; {limit}", hint=f"at most {most} can be removed: {size}")
    if number < 1:
        size = amount(target, original, current, current.expert_parameters)
        raise TargetError(
            f"the target ({target.describe()}) is less than half an expert of every layer",
            hint=f"one expert of every layer is {size}: ask for that or more",
        )
    return number
