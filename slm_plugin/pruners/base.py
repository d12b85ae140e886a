"""The common pruner interface: a strategy scores and decides, it never changes the model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import BaseModel, ConfigDict

from slm_plugin.errors import TargetError
from slm_plugin.models.view import Dimensions
from slm_plugin.target import Target

if TYPE_CHECKING:
    from slm_plugin.plans import PruningPlan
    from slm_plugin.session import Session


# The default of `multiple_of`.
_CHANNELS_AT_A_TIME = 8


class Options(BaseModel):
    """Base of every component's options: unknown keys are errors, values are fixed."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Pruner(ABC):
    """A strategy that decides what to prune.

    A subclass sets the class variables, registers itself under a name with
    `slm_plugin.register_pruner` and implements `plan`. Its ``Options`` become the keys of its
    stage in a recipe. ``streams`` says that the strategy works on a model whose layers are read
    from disk one at a time: it runs layers through `run_batches` and looks at no weight itself;
    ``keeps_trials`` that it writes a journal of them into the cache folder.

    Args:
        options: An instance of the class's ``Options``.
        target: How much to prune; its kind is one of ``targets``.
    """

    name: ClassVar[str]
    kind: ClassVar[Literal["depth", "width"]]
    targets: ClassVar[tuple[str, ...]]
    extra: ClassVar[str | None] = None
    streams: ClassVar[bool] = False
    keeps_trials: ClassVar[bool] = False
    Options: ClassVar[type[BaseModel]] = Options

    def __init__(self, options: BaseModel, target: Target) -> None:
        self.options = options
        self.target = target

    @property
    def needs_calibration(self) -> bool:
        """Whether the strategy, with these options, measures on calibration data."""
        return True

    @abstractmethod
    def plan(self, session: Session) -> PruningPlan:
        """Decide what to prune, and leave the session's model as it is.

        `Session.plan` calls it, in evaluation mode and from the session's seed, and refuses a
        strategy that changed the model. Whatever is random here starts from `Session.seed`.

        Raises:
            TargetError: The target cannot be reached.
        """

    def check(self) -> None:  # noqa: B027 - most options go with most targets
        """Refuse a target that goes with these options on no model, when the recipe is read.

        Raises:
            TargetError: It does not.
        """

    def check_target(self, original: Dimensions, current: Dimensions) -> None:
        """Refuse an impossible target before any work; strategies refine this.

        Raises:
            TargetError: The target is out of reach for every strategy of this kind.
        """
        if self.kind == "depth" and self.target.kind != "threshold":
            layers_to_remove(self.target, original, current)


def layers_to_remove(target: Target, original: Dimensions, current: Dimensions) -> int:
    """Whole layers that come nearest to a target.

    Raises:
        TargetError: That would be no layer, or all of them.
    """
    if target.layers_removed is not None:
        wanted = target.layers_removed
    else:
        scalars = target.parameters_to_remove(original.parameters, current.parameters)
        wanted = round(scalars / current.layer_parameters)
    share = current.layer_parameters / original.parameters
    if wanted < 1:
        raise TargetError(
            f"the target ({target.describe()}) is less than half a layer of this model",
            hint=f"one layer is {share:.1%} of its parameters: ask for that or more",
        )
    if wanted >= current.layers:
        raise TargetError(
            f"the target ({target.describe()}) means {wanted} layers; the model has "
            f"{current.layers}",
            hint=f"at most {current.layers - 1} can go: layers_removed {current.layers - 1} or "
            f"ratio {(current.layers - 1) * share:.2f}",
        )
    return wanted


def missed(target: Target, plan: PruningPlan, original: Dimensions) -> str:
    """How far a plan is from its target, in words; empty where no other plan need be nearer.

    A size is met to half of what is taken at a time: a layer, or, in every layer, one KV group or
    as many channels as the built-in width strategy rounds to by itself.

    Args:
        target: What was asked for.
        plan: What was decided.
        original: The model as it was loaded.
    """
    if target.layers_removed is not None:
        if plan.layers_removed == target.layers_removed:
            return ""
        return f"asked to remove {target.layers_removed} layers, its plan removes " + str(
            plan.layers_removed
        )
    if target.threshold is not None:
        return ""
    before = plan.before
    step = before.layer_parameters
    if plan.kind == "width":
        step = before.layers * max(
            _CHANNELS_AT_A_TIME * before.channel_parameters, before.kv_group_parameters
        )
    wanted = target.parameters_to_remove(original.parameters, before.parameters)
    if 2 * abs(plan.parameters_removed - wanted) <= step + 1:
        return ""
    return (
        f"{target.describe()} means {wanted:,} parameters to remove, the plan removes "
        f"{plan.parameters_removed:,}"
    )


def refuse_beyond(target: Target, wanted: int, most: int, layers: int, protection: str) -> None:
    """Refuse to remove more layers than protection leaves.

    Args:
        target: What was asked for.
        wanted: Layers that it means.
        most: Layers that can go.
        layers: Layers of the model.
        protection: What keeps the others, in words.

    Raises:
        TargetError: More layers are wanted than can go.
    """
    if wanted > most:
        raise TargetError(
            f"the target ({target.describe()}) means {wanted} layers; with {protection} "
            f"at most {most} of {layers} can go",
            hint="lower the target or the protection",
        )
