"""Pruning as a cooperative game: drop the layers with the lowest Shapley values.

Source: Pruning as a Cooperative Game (arXiv 2602.07804) for the game; ApproShapley (Castro et al.
2009) and the truncation of Data Shapley (arXiv 1904.02868) for the estimate.
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
from slm_plugin.pruners.depth.decision import depth_plan
from slm_plugin.pruners.depth.dropping import BetweenEnds, EndsOptions, lowest, one_by_one
from slm_plugin.pruners.depth.search.runs import DROP, Run
from slm_plugin.pruners.depth.search.trials import Trials, trials_of
from slm_plugin.registry import register_pruner

if TYPE_CHECKING:
    from slm_plugin.session import Session

# A model whose perplexity is a hundred times the original's has nothing left to lose.
NOTHING_LEFT = 0.01

# What a model without some layers, given in ascending order, is worth.
Worth = Callable[[tuple[int, ...]], float]


class ShapleyOptions(EndsOptions):
    """How many shortened models are looked at."""

    samples: Annotated[
        Count,
        Field(
            description="about how many shortened models are evaluated; where no more exist, all "
            "are, and the values are exact",
        ),
    ] = 2000


class Estimate(NamedTuple):
    """Estimated Shapley values.

    Attributes:
        values: One a player.
        errors: Their standard errors.
        pairs: Pairs of orders that they are means over.
    """

    values: list[float]
    errors: list[float]
    pairs: int


@register_pruner("shapley")
class Shapley(BetweenEnds):
    """Drop the layers that add least, on average over all orders of losing layers (Shapley).

    The layers that may go are the players, and the worth of a shortened model is the original's
    perplexity over its own. See docs/methods.md for how this departs from the paper.
    """

    streams: ClassVar = True
    keeps_trials: ClassVar = True
    Options: ClassVar = ShapleyOptions
    options: ShapleyOptions

    def plan(self, session: Session) -> PruningPlan:
        """Value every layer that may go, once, and drop the lowest.

        Raises:
            TargetError: The target cannot be reached.
            NumericalError: The model or a shortened one gives NaN.
        """
        wanted = self.wanted(session)
        players = self.eligible(len(session.view.layers))
        with trials_of(session, self.name, "loss", DROP) as trials:
            worth = worth_of(trials)
            if 2 ** len(players) <= self.options.samples:
                values = exact_values(players, worth)
                how = f"exact: all {2 ** len(players)} models without some of the layers were seen"
            else:
                found = estimated_values(players, worth, self.options.samples, session.seed)
                values = found.values
                how = (
                    f"estimated on {len(trials.made)} shortened models, along {found.pairs} random "
                    f"orders and their reverses; standard errors {min(found.errors):.2g} to "
                    f"{max(found.errors):.2g}"
                )
        scores = [1.0] * len(session.view.layers)
        for player, value in zip(players, values, strict=True):
            scores[player] = value
        gone = lowest(scores, wanted, players)
        meaning = (
            "Shapley value, in parts of the original's quality (its perplexity over the shortened "
            "model's); 1 for a protected layer"
        )
        return depth_plan(
            self,
            session,
            one_by_one(gone),
            ["layers go in the order of their Shapley values", how],
            layer_scores=LayerScores(meaning=meaning, scores=tuple(scores)),
        )


def worth_of(trials: Trials) -> Worth:
    """The original's perplexity over that of the model without some layers: v(m) of the paper.

    Args:
        trials: Say how much the loss grows.
    """

    def worth(gone: tuple[int, ...]) -> float:
        if not gone:
            return 1.0
        first, *others = gone
        rest = tuple(Run(index, index, DROP) for index in others)
        return math.exp(trials(first, first, rest).value)

    return worth


def exact_values(players: Sequence[int], worth: Worth) -> list[float]:
    """Shapley values by their definition, from the worths of all coalitions.

    Args:
        players: Layers that may go, in ascending order.
        worth: Worth of the model without some of them.

    Returns:
        One value a player; they add up to the worth of all less the worth of none.
    """
    count = len(players)
    worths = {
        gone: worth(gone) for size in range(count + 1) for gone in combinations(players, size)
    }
    values = dict.fromkeys(players, 0.0)
    for gone, before in worths.items():
        for player in set(players) - set(gone):
            after = worths[tuple(sorted((*gone, player)))]
            values[player] += (before - after) / (count * math.comb(count - 1, len(gone)))
    return [values[player] for player in players]


def estimated_values(players: Sequence[int], worth: Worth, samples: int, seed: int) -> Estimate:
    """Shapley values as means over random orders in which the players go.

    In every order each player is worth what is lost when it goes. An order and its reverse make a
    pair: who goes early in one goes late in the other, which evens out most of the chance. Once
    nothing is left, who goes later loses nothing.

    Args:
        players: Layers that may go, in ascending order.
        worth: Worth of the model without some of them.
        samples: Coalitions to look at; at least two pairs are finished, and the last one.
        seed: Decides the orders.

    Returns:
        The values, with standard errors from the spread of the pairs. They add up to the worth of
        all less what was left at the end of an order, on average.

    Source: Castro, Gómez & Tejada (2009), ApproShapley; the reverse orders are antithetic
    sampling (arXiv 2104.12199); the end of an order is Data Shapley's truncation
    (arXiv 1904.02868).
    """
    generator = torch.Generator().manual_seed(seed)
    pairs: list[list[float]] = []
    seen = 0
    while seen < samples or len(pairs) < 2:
        order = [players[place] for place in torch.randperm(len(players), generator=generator)]
        there, back = losses_in_turn(order, worth), losses_in_turn(order[::-1], worth)
        pairs.append([(there.get(p, 0.0) + back.get(p, 0.0)) / 2 for p in players])
        seen += len(there) + len(back)
    table = torch.tensor(pairs, dtype=torch.float64)
    errors = table.std(0) / math.sqrt(len(pairs))
    return Estimate(table.mean(0).tolist(), errors.tolist(), len(pairs))


def losses_in_turn(order: Sequence[int], worth: Worth) -> dict[int, float]:
    """What is lost with each player when they go in this order, until nothing is left."""
    lost: dict[int, float] = {}
    left = worth(())
    for player in order:
        after = worth(tuple(sorted((*lost, player))))
        lost[player] = left - after
        left = after
        if left < NOTHING_LEFT:
            break
    return lost
