"""The pruner interface: a strategy scores and plans, and never changes the model."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel

from slm_plugin.component import Component
from slm_plugin.errors import TargetError, UnsupportedModelError
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.plans.plan import PlanKind
from slm_plugin.target import Target

if TYPE_CHECKING:
    from slm_plugin.plans import PruningPlan
    from slm_plugin.session import Session


# The default of `multiple_of`.
_CHANNELS_AT_A_TIME = 8


class Pruner(Component):
    """A strategy that decides what to prune.

    A subclass sets the class variables, registers itself under a name with
    `slm_plugin.register_pruner` and implements `plan`.

    Attributes:
        kind: Whether its plans are about layers, about what is inside layers, or hybrid.
        targets: Kinds of targets that it takes.
        merges: It merges layers, so it stays within layers of one kind.
        keeps_trials: It writes trials into the cache folder; may depend on the options.
        on_uneven: It works on a model whose layers differ in their MLP channels.

    Args:
        options: An instance of the class's ``Options``.
        target: How much to prune; its kind is one of ``targets``.
    """

    kind: ClassVar[PlanKind]
    targets: ClassVar[tuple[str, ...]]
    merges: ClassVar[bool] = False
    keeps_trials: bool = False
    on_uneven: ClassVar[bool] = False

    def __init__(self, options: BaseModel, target: Target) -> None:
        super().__init__(options)
        self.target = target

    @property
    def needs_calibration(self) -> bool:
        """Whether the strategy, with these options, measures on calibration data."""
        return True

    @property
    def followed_by(self) -> Mapping[str, Any] | None:
        """The recovery that belongs to it, with these options, as a stage of a recipe.

        A recipe or a comparison that has the strategy runs it right behind the strategy's plan.
        """
        return None

    @property
    def leaves_uneven(self) -> bool:
        """Whether layers may differ in their MLP channels afterwards, with these options."""
        return False

    @property
    def without_operators(self) -> str:
        """What to set so that no operators are inserted; empty where these options insert none.

        Behind operators (`slm_plugin.models.operators`) no stage can prune or use the reference,
        and only exporters that store them can write the model.
        """
        return ""

    @abstractmethod
    def plan(self, session: Session) -> PruningPlan:
        """Plan what to prune, without changing the session's model.

        `Session.plan` calls it in evaluation mode and from the session's seed, and raises an error
        if the model changed. Seed random generators from `Session.seed`.

        Raises:
            TargetError: The target cannot be reached.
        """

    def check(self) -> None:
        """Check, when the recipe is read, that the options allow the target on some model.

        Raises:
            TargetError: They do not.
        """

    def check_target(self, original: Dimensions, current: Dimensions) -> None:
        """Check the target before any work; strategies refine this.

        Raises:
            TargetError: No strategy of this kind can reach the target.
        """
        if self.kind == "depth" and self.target.counts:
            layers_to_remove(self.target, original, current)


def refuse_uneven(pruner: Pruner, current: Dimensions) -> None:
    """Check that a strategy works on a model whose layers differ in their MLP channels.

    Raises:
        UnsupportedModelError: They differ, and it does not.
    """
    if current.layer_widths and not getattr(pruner, "on_uneven", False):
        raise UnsupportedModelError(
            f"the layers have {current.width_range} MLP channels, and "
            f"'{getattr(pruner, 'name', type(pruner).__name__)}' needs layers of one width",
            hint="use it before `width` with an `allocation`; only `width` can follow that",
        )


def layers_to_remove(target: Target, original: Dimensions, current: Dimensions) -> int:
    """Number of whole layers nearest to a target that counts layers or parameters.

    Raises:
        TargetError: The number is 0, or all layers.
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
            hint=f"at most {current.layers - 1} can be removed: "
            f"layers_removed {current.layers - 1} or ratio {(current.layers - 1) * share:.2f}",
        )
    return wanted


def missed(target: Target, plan: PruningPlan, original: Dimensions) -> str:
    """Message about a plan that missed its target; empty where it met the target.

    A size is met to half a step: one layer, or, in every layer, one KV group, one expert, or as
    many channels as the built-in width strategy rounds to by default.

    Args:
        target: The target.
        plan: The plan.
        original: Dimensions of the original model.
    """
    if target.layers_removed is not None:
        if plan.layers_removed == target.layers_removed:
            return ""
        return f"asked to remove {target.layers_removed} layers, its plan removes " + str(
            plan.layers_removed
        )
    # A plan tells neither a threshold nor the time or the memory of a workload.
    if not target.counts:
        return ""
    before = plan.before
    step = before.layer_parameters
    if plan.kind != "depth":
        step = before.layers * max(
            _CHANNELS_AT_A_TIME * before.channel_parameters,
            before.kv_group_parameters,
            before.expert_parameters,
        )
    wanted = target.parameters_to_remove(original.parameters, before.parameters)
    if 2 * abs(plan.parameters_removed - wanted) <= step + 1:
        return ""
    return (
        f"{target.describe()} means {wanted:,} parameters to remove, the plan removes "
        f"{plan.parameters_removed:,}"
    )


def with_fixed_layers(protection: str, fixed: int) -> str:
    """Description of protected layers, with those that the model's class protects."""
    if not fixed:
        return protection
    return f"{protection}, and the lowest {fixed} fixed (vision features are added behind them)"


def refuse_beyond(target: Target, wanted: int, most: int, layers: int, protection: str) -> None:
    """Check that protected layers leave enough to remove.

    Args:
        target: The target.
        wanted: Number of layers to remove.
        most: Number of layers that can be removed.
        layers: Layers of the model.
        protection: Description of the protected layers.

    Raises:
        TargetError: The target needs more layers than can be removed.
    """
    if wanted > most:
        raise TargetError(
            f"the target ({target.describe()}) means {wanted} layers; with {protection} "
            f"at most {most} of {layers} can be removed",
            hint="lower the target or the protection",
        )
