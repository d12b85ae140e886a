"""Pruning as a cooperative game: drop the layers with the lowest Shapley values.

Source: Pruning as a Cooperative Game (arXiv 2602.07804) for the game; ApproShapley (Castro et al.
2009) with the truncation of Data Shapley (arXiv 1904.02868) for the estimate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import TYPE_CHECKING, Annotated, ClassVar, NamedTuple

from pydantic import Field

from slm_plugin.counts import Count
from slm_plugin.lazy import torch
from slm_plugin.plans import LayerScores, PruningPlan
from slm_plugin.pruners.depth.depth_plan import depth_plan
from slm_plugin.pruners.depth.dropping import BetweenEnds, EndsOptions, lowest, one_by_one
from slm_plugin.pruners.depth.search.runs import DROP, Run
from slm_plugin.pruners.depth.search.trials import Trials, trials_of
from slm_plugin.registry import register_pruner

if TYPE_CHECKING:
    from slm_plugin.session import Session

# Truncation: a model of a hundred times the original's perplexity counts as having no value.
TRUNCATION = 0.01

# The value of the model without some layers, given in ascending order.
ValueFunction = Callable[[tuple[int, ...]], float]


class ShapleyOptions(EndsOptions):
    """The number of shortened models to evaluate."""

    samples: Annotated[
        Count,
        Field(
            description="approximate number of shortened models to evaluate; if no more exist, all "
            "are evaluated and the values are exact",
        ),
    ] = 2000


class Estimate(NamedTuple):
    """Estimated Shapley values.

    Attributes:
        values: One per player.
        errors: Their standard errors.
        pairs: Number of pairs of orders that were averaged.
    """

    values: list[float]
    errors: list[float]
    pairs: int


@register_pruner("shapley")
class Shapley(BetweenEnds):
    """Drop the layers with the lowest Shapley values.

    The players are the layers that may be removed. The value of a shortened model is the original's
    perplexity divided by its own. docs/methods.md lists the differences from the paper.
    """

    unlisted: ClassVar[bool] = True
    streams: ClassVar = True
    keeps_trials = True
    Options: ClassVar = ShapleyOptions
    options: ShapleyOptions

    def plan(self, session: Session) -> PruningPlan:
        """Compute the Shapley value of every eligible layer once, and drop the lowest.

        Raises:
            TargetError: The target cannot be reached.
            NumericalError: The model or a shortened one gives NaN.
        """
        wanted = self.wanted(session)
        players = self.removable(session.view)
        with trials_of(session, self.name, "loss", DROP) as trials:
            value_of = value_function(trials)
            if 2 ** len(players) <= self.options.samples:
                values = exact_values(players, value_of)
                how = f"exact: all {2 ** len(players)} coalitions were evaluated"
            else:
                found = estimated_values(players, value_of, self.options.samples, session.seed)
                values = found.values
                how = (
                    f"estimated on {len(trials.made)} shortened models, along {found.pairs} random "
                    f"orders and their reverses; standard errors {min(found.errors):.2g} to "
                    f"{max(found.errors):.2g}"
                )
        scores = [1.0] * len(session.view.layers)
        for player, value in zip(players, values, strict=True):
            scores[player] = value
        dropped = lowest(scores, wanted, players)
        meaning = (
            "Shapley value, relative to the original's quality (its perplexity over the shortened "
            "model's); 1 for a protected layer"
        )
        return depth_plan(
            self,
            session,
            one_by_one(dropped),
            ["layers are removed in the order of their Shapley values", how],
            layer_scores=LayerScores(meaning=meaning, scores=tuple(scores)),
        )


def value_function(trials: Trials) -> ValueFunction:
    """The original's perplexity over that of the model without some layers: v(m) of the paper.

    Args:
        trials: Measure the increase of the loss.
    """

    def value_of(removed: tuple[int, ...]) -> float:
        if not removed:
            return 1.0
        first, *others = removed
        rest = tuple(Run(index, index, DROP) for index in others)
        return math.exp(trials(first, first, rest).value)

    return value_of


def exact_values(players: Sequence[int], value_of: ValueFunction) -> list[float]:
    """Shapley values by their definition, from the values of all coalitions.

    Args:
        players: Layers that may be removed, in ascending order.
        value_of: Value of the model without some of them.

    Returns:
        One value per player; their sum is the value of all players minus the value of none.
    """
    count = len(players)
    coalitions = {
        removed: value_of(removed)
        for size in range(count + 1)
        for removed in combinations(players, size)
    }
    values = dict.fromkeys(players, 0.0)
    for removed, before in coalitions.items():
        for player in set(players) - set(removed):
            after = coalitions[tuple(sorted((*removed, player)))]
            values[player] += (before - after) / (count * math.comb(count - 1, len(removed)))
    return [values[player] for player in players]


def estimated_values(
    players: Sequence[int], value_of: ValueFunction, samples: int, seed: int
) -> Estimate:
    """Shapley values estimated as means over random orders of removal.

    In every order, a player's marginal contribution is the value lost when it is removed. Orders
    come in pairs with their reverse (antithetic sampling), which reduces the variance. Below
    `TRUNCATION` all further contributions count as 0.

    Args:
        players: Layers that may be removed, in ascending order.
        value_of: Value of the model without some of them.
        samples: Number of coalitions to evaluate; the last pair is completed, and at least two
            pairs are.
        seed: Seed of the orders.

    Returns:
        The values, with standard errors from the variance of the pairs. Their sum is the value of
        all players minus the mean value left at the end of an order.

    Source: Castro, Gómez & Tejada (2009), ApproShapley; antithetic sampling: arXiv
    2104.12199; truncation: Data Shapley (arXiv 1904.02868).
    """
    generator = torch.Generator().manual_seed(seed)
    pairs: list[list[float]] = []
    seen = 0
    while seen < samples or len(pairs) < 2:
        order = [players[place] for place in torch.randperm(len(players), generator=generator)]
        there, back = losses_in_turn(order, value_of), losses_in_turn(order[::-1], value_of)
        pairs.append([(there.get(p, 0.0) + back.get(p, 0.0)) / 2 for p in players])
        seen += len(there) + len(back)
    table = torch.tensor(pairs, dtype=torch.float64)
    errors = table.std(0) / math.sqrt(len(pairs))
    return Estimate(table.mean(0).tolist(), errors.tolist(), len(pairs))


def losses_in_turn(order: Sequence[int], value_of: ValueFunction) -> dict[int, float]:
    """Marginal contributions along one order of removal, until `TRUNCATION`."""
    lost: dict[int, float] = {}
    left = value_of(())
    for player in order:
        after = value_of(tuple(sorted((*lost, player))))
        lost[player] = left - after
        left = after
        if left < TRUNCATION:
            break
    return lost
