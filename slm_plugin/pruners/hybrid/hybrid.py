"""Choose how much a model loses in depth and how much in width, for one target.

Source: the parts are those of NVIDIA's Puzzletron, a library of variants, a cost model and a choice
within a budget; here for uniform shapes, which stock classes load, or for a choice of every layer's
own, and with variants that are measured after their restoration. Depth first, then width, is
the order of its guide's best chain.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from slm_plugin.cache import Store
from slm_plugin.extras import require
from slm_plugin.models.dimensions import Dimensions
from slm_plugin.plans import FrontierShape, PruningPlan, UnitScores
from slm_plugin.pruners.base import Pruner
from slm_plugin.pruners.depth.repaired import Repaired
from slm_plugin.pruners.depth.repaired_options import RepairedOptions
from slm_plugin.pruners.hybrid.allotment import allotments
from slm_plugin.pruners.hybrid.budget import Budget, memory_budget, parameter_budget, time_budget
from slm_plugin.pruners.hybrid.choice import Choice, chosen, is_measured
from slm_plugin.pruners.hybrid.increases import is_divergence, layer_increases
from slm_plugin.pruners.hybrid.integer import MOST_SIZES, chosen_widths
from slm_plugin.pruners.hybrid.options import HybridOptions
from slm_plugin.pruners.hybrid.range import Range, shapes_within
from slm_plugin.pruners.hybrid.shapes import AnyShape, MixedShape, Shape
from slm_plugin.pruners.hybrid.workload import Workload
from slm_plugin.pruners.trial_store import repair_target, trial_store
from slm_plugin.pruners.width.budget import Cut
from slm_plugin.pruners.width.coupling import check_coupling
from slm_plugin.pruners.width.width import Width
from slm_plugin.pruners.width.width_options import WidthOptions
from slm_plugin.registry import register_pruner
from slm_plugin.surgery.portability import portability
from slm_plugin.target import Target

if TYPE_CHECKING:
    from slm_plugin.models.families.family import Family
    from slm_plugin.pruners.depth.search.repaired_trials import Judged
    from slm_plugin.session import Session

# Adherence below this is warned of.
LEAST_ADHERENCE = 0.98


@register_pruner("hybrid")
class Hybrid(Pruner):
    """Drop layers and narrow the others, by the split that changes the model least.

    The order of the layers is one search of `repaired`, the order of the channels one ranking by a
    score of `width`. The divergence KL(model || pruned model) of depth and of width alone predicts
    that of every shape that meets the target; the best are restored and measured on held-out
    samples, and the best of these is taken. A recipe runs ``recover: refit`` behind the plan.

    With ``search: integer`` every layer has a width of its own or is removed: an integer
    programme chooses by what each change alone costs after its repair.
    """

    kind: ClassVar = "hybrid"
    targets: ClassVar = ("ratio", "parameters", "latency", "memory")
    extra: ClassVar[str | None] = "width"
    keeps_trials = True
    Options: ClassVar = HybridOptions
    options: HybridOptions

    @classmethod
    def unsuited(cls, family: Family, config: Mapping[str, Any]) -> str:
        """It needs MLP channels to remove, and linear maps to restore."""
        if "channels" not in family.units:
            return family.reason("channels")
        return family.no_fit

    def unsuited_options(self, family: Family, config: Mapping[str, Any]) -> str:
        """Its search for layers must suit the model."""
        return self._search(1).unsuited_options(family, config)

    @property
    def leaves_uneven(self) -> bool:
        """With the integer programme."""
        return self.options.search == "integer"

    @property
    def followed_by(self) -> Mapping[str, Any] | None:
        """The restoration."""
        return {"recover": "refit"}

    def check_target(self, original: Dimensions, current: Dimensions) -> None:
        """Check a size; what time and memory a shape takes depends on more than its dimensions.

        Raises:
            TargetError: No shape meets it; the hint names the nearest that does.
            UnsupportedModelError: Layers differ in width.
        """
        Shape.of(current)
        if self.target.counts:
            budget = parameter_budget(self.target, original, current)
            within = allotments if self.leaves_uneven else shapes_within
            within(budget, self._range(current))

    def plan(self, session: Session) -> PruningPlan:
        """Search, rank, predict, measure and choose, without changing the model.

        Raises:
            TargetError: No shape meets the target; the hint names the nearest that does.
            UserError: The workload of a target of memory or latency exceeds the model's positions.
            UnsupportedModelError: Layers differ in width, or torch-pruning couples the
                projections differently.
            CalibrationError: There are fewer than 2 calibration samples.
            NumericalError: A divergence or a score is NaN or infinite.
        """
        require("width", f"the pruner {self.name}")
        before = session.view.dimensions()
        check_coupling(session.view)
        budget = self._budget(session)
        verify = self.options.verify
        journal = self._journal(session, "shapes, layers by unfitted samples", is_measured)
        if self.leaves_uneven:
            return self._plan(session, budget, self._mixed(session, budget, journal))
        shapes = shapes_within(budget, self._range(before))
        order, others = self._order(session, shapes)
        scores = self._scores(session, _largest_cut(before, shapes))
        choice = chosen(session, shapes, order, scores, verify, journal)
        return self._plan(session, budget, choice, order, others)

    def _mixed(self, session: Session, budget: Budget, journal: Store) -> Choice:
        """The choice of a width for every layer."""
        options, sizes = self.options, self._range(session.view.dimensions())
        within = allotments(budget, sizes)
        most = max(allotment.removed for allotment in within)
        removable = self._search(1).removable(session.view) if most else ()
        scores = self._scores(session, Cut(sizes.widths[0] - sizes.widths[-1], 0))
        known = self._journal(session, "divergences", is_divergence)
        found = layer_increases(session, sizes.widths, removable, scores, options.repair, known)
        return chosen_widths(session, within, found, scores, options.verify, journal)

    def _search(self, layers_removed: int) -> Repaired:
        """The search for layers."""
        options = self.options
        asked = RepairedOptions(
            repair=options.repair,
            screen=options.screen,
            judge="kl",
            protect_first=options.protect_first,
            protect_last=options.protect_last,
        )
        return Repaired(asked, Target(layers_removed=layers_removed))

    def _range(self, dense: Dimensions) -> Range:
        options = self.options
        removable = self._search(1).most_removable(dense)
        multiple = options.multiple_of
        if self.leaves_uneven:
            multiple *= math.ceil(dense.intermediate_size / (MOST_SIZES * multiple))
        return Range.of(dense, removable, kv_groups=options.kv_groups, multiple_of=multiple)

    def _budget(self, session: Session) -> Budget:
        """What the target allows."""
        target, current = self.target, session.view.dimensions()
        if target.counts:
            return parameter_budget(target, session.original, current)
        workload = self.options.workload
        workload.check_room(session.model, f"a target of {target.kind}")
        if target.latency is None:
            return memory_budget(target, current, workload, session.model.dtype)
        return time_budget(session, target, workload, kv_groups=self.options.kv_groups)

    def _order(
        self, session: Session, shapes: Sequence[Shape]
    ) -> tuple[list[Judged], list[Judged]]:
        """The layers in the order in which they go, and what else the search judged."""
        most = len(session.view.layers) - min(shape.layers for shape in shapes)
        return self._search(most).search(session, most) if most else ([], [])

    def _scores(self, session: Session, cut: Cut) -> tuple[UnitScores, ...]:
        """Scores of the units of every layer; none where no shape is narrower."""
        if cut == Cut(0, 0):
            return ()
        score = WidthOptions(score=self.options.score, restore="none")
        return Width(score, Target(ratio=0.5)).score(session, cut)

    def _journal(self, session: Session, form: str, valid: Callable[[Any, Any], bool]) -> Store:
        """Divergences of shapes or of replacements, by all that they depend on."""
        unrelated = {"verify", *Workload.model_fields}
        about = f"{self.name} {self.options.model_dump_json(exclude=unrelated)}"
        return trial_store(session, about + repair_target(session), form, valid)

    def _plan(
        self,
        session: Session,
        budget: Budget,
        choice: Choice,
        order: Sequence[Judged] = (),
        others: Sequence[Judged] = (),
    ) -> PruningPlan:
        """The plan of the chosen shape, with all that it was chosen from."""
        before, best = session.view.dimensions(), choice.best
        after = best.of_model(before)
        cost = budget.cost(best)
        adherence = budget.adherence(cost)
        removed = before.layers - after.layers
        kinds = {operation.kind for operation in choice.operations}
        warnings = list(portability(before, after, session.view.config))
        if adherence < LEAST_ADHERENCE:
            warnings.append(budget.missed_by(best, choice.predicted))
        return PruningPlan(
            pruner=self.name,
            kind="hybrid" if len(kinds) > 1 else kinds.pop(),
            options=self.options.model_dump(mode="json"),
            target=self.target,
            fingerprint=session.fingerprint(),
            before=before,
            after=after,
            operations=choice.operations,
            trials=tuple(one.trial(accepted=True) for one in order[:removed]),
            explored=tuple(one.trial(accepted=False) for one in others),
            scores=choice.scores,
            followed_by=dict(self.followed_by or {}),
            frontier=tuple(
                FrontierShape(
                    layers=shape.layers,
                    mlp_width=shape.mlp_width,
                    kv_groups=shape.kv_groups,
                    parameters=shape.of_model(before).parameters,
                    cost=budget.cost(shape) / budget.dense,
                    predicted=choice.predicted[shape],
                    measured=choice.measured.get(shape),
                    chosen=shape == best,
                    widths=shape.widths if isinstance(shape, MixedShape) else None,
                )
                for shape in sorted(choice.predicted, key=_size, reverse=True)
            ),
            adherence=round(adherence, 4),
            notes=(
                f"chosen of {len(choice.predicted)} shapes: {best.layers} of {before.layers} "
                f"layers with {after.width_range} of {before.width_range} MLP channels and "
                f"{best.kv_groups} of {before.kv_heads} KV groups each",
                f"target {self.target.describe()}: allowed {budget.said(budget.allowed)}, "
                f"reached {budget.said(cost)}, adherence {adherence:.3f}",
                *choice.notes,
                *budget.notes,
            ),
            warnings=tuple(warnings),
        )


def _largest_cut(dense: Dimensions, shapes: Sequence[Shape]) -> Cut:
    """The most channels and the most KV groups that a layer of any of the shapes loses."""
    return Cut(
        dense.intermediate_size - min(shape.mlp_width for shape in shapes),
        dense.kv_heads - min(shape.kv_groups for shape in shapes),
    )


def _size(shape: AnyShape) -> tuple[int, int, int]:
    return shape.layers, shape.mlp_width, shape.kv_groups
