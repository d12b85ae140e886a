"""Removal of whole experts from mixtures, as many from every layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from slm_plugin.component import Options
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.plans import KeepExperts, PruningPlan, UnitScores
from slm_plugin.pruners.base import Pruner
from slm_plugin.pruners.width.expert_budget import experts_to_remove
from slm_plugin.pruners.width.expert_scores import routed_mass, taylor
from slm_plugin.pruners.width.importance import kept_units
from slm_plugin.pruners.width.width_plan import width_plan
from slm_plugin.registry import register_pruner
from slm_plugin.surgery.portability import portability
from slm_plugin.target import Target

if TYPE_CHECKING:
    from slm_plugin.models.families.family import Family
    from slm_plugin.session import Session


class ExpertsOptions(Options):
    """Importance score of an expert."""

    importance: Annotated[
        Literal["routed_mass", "taylor"],
        Field(
            description="routed_mass sums the weights that the router gives to an expert, taylor "
            "what the expert's weights change in the loss; both read the calibration set"
        ),
    ] = "routed_mass"


@register_pruner("experts")
class ExpertPruning(Pruner):
    """Remove the same number of whole experts from every layer of a mixture.

    Each layer ranks its own experts; an expert goes with its row of the router. Experts that
    every token has (Qwen2-MoE's shared expert) stay. The result loads with stock classes.
    """

    kind: ClassVar[Literal["depth", "width"]] = "width"
    targets: ClassVar[tuple[str, ...]] = ("ratio", "parameters")
    Options = ExpertsOptions

    def __init__(self, options: ExpertsOptions, target: Target) -> None:
        super().__init__(options, target)
        self.options: ExpertsOptions = options

    def check_target(self, original: Dimensions, current: Dimensions) -> None:
        """Check the target before any work.

        Raises:
            TargetError: The target is out of reach; the hint names the reachable range.
        """
        experts_to_remove(self.target, original, current)

    @classmethod
    def unsuited(cls, family: Family, config: Mapping[str, Any]) -> str:
        """There must be experts."""
        return "" if "experts" in family.units else family.reason("experts")

    def plan(self, session: Session) -> PruningPlan:
        """Score all experts and choose those that remain, without changing the model.

        Raises:
            TargetError: The target is out of reach; the hint names the reachable range.
            CalibrationError: There is no calibration set.
            NumericalError: The loss or a score is NaN or infinite.
        """
        before = session.view.dimensions()
        number = experts_to_remove(self.target, session.original, before)
        after = before.without_units(experts=number)
        warnings = portability(before, after, session.view.config)
        scores = self._score(session)
        operations = (
            KeepExperts(layer=one.layer, experts=kept_units(one.scores, number)) for one in scores
        )
        return width_plan(self, session, after, operations, scores, _kept(before, after), warnings)

    def _score(self, session: Session) -> tuple[UnitScores, ...]:
        score = taylor if self.options.importance == "taylor" else routed_mass
        return score(session.view, session.batches())


def _kept(before: Dimensions, after: Dimensions) -> str:
    return (
        f"every layer keeps {after.experts} of {before.experts} experts; each token has "
        f"{after.experts_per_token} of them as before, so a pass computes as much"
    )
