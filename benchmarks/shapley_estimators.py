"""How near estimates of Shapley values come to them on games whose values are known.

A game of 28 layers: the loss grows by every layer that is gone, much by two of them, and, with
``--interaction``, more by neighbours that go together; the worth is the exponential of minus the
growth, as in the strategy ``shapley``. Compared at equal numbers of evaluated models are that
strategy's estimate and KernelSHAP (Lundberg & Lee 2017): a linear fit on masks drawn by the Shapley
kernel in complementary pairs, with the sum of the values fixed. The
known values are the former's on two hundred thousand models, cut off a hundred times later.

    python benchmarks/shapley_estimators.py
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from slm_plugin.pruners.depth import shapley

LAYERS = 28
Game = Callable[[Tensor], Tensor]


def game(interaction: float) -> Game:
    """Worths of masks ``(masks, layers)``, in which 1 is a layer that is gone."""
    generator = torch.Generator().manual_seed(1)
    alone = 0.12 * torch.randn(LAYERS, generator=generator, dtype=torch.float64).mul(0.6).exp()
    alone[0], alone[-1] = 4.0, 2.0
    apart = (torch.arange(LAYERS)[:, None] - torch.arange(LAYERS)).abs()
    pairs = torch.rand(LAYERS, LAYERS, generator=generator, dtype=torch.float64) * 0.1
    pairs = interaction * (pairs + pairs.T).triu(1) * torch.exp(-apart / 4)

    def worths(gone: Tensor) -> Tensor:
        gone = gone.double()
        return torch.exp(-(gone @ alone) - ((gone @ pairs) * gone).sum(-1))

    return worths


def by_orders(worths: Game, samples: int, seed: int) -> Tensor:
    """The estimate of the strategy."""

    def worth(lost: tuple[int, ...]) -> float:
        mask = torch.zeros(1, LAYERS)
        mask[0, list(lost)] = 1
        return float(worths(mask))

    found = shapley.estimated_values(range(LAYERS), worth, samples, seed)
    return torch.tensor(found.values, dtype=torch.float64)


def by_linear_fit(worths: Game, samples: int, seed: int) -> Tensor:
    """KernelSHAP, with pairs of complementary masks and the sum of the values fixed."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.arange(1, LAYERS)
    kernel = 1 / (sizes * (LAYERS - sizes)).double()
    drawn = 1 + torch.multinomial(kernel, samples // 2, replacement=True, generator=generator)
    ranks = torch.rand(len(drawn), LAYERS, generator=generator).argsort(-1).argsort(-1)
    half = (ranks < drawn[:, None]).double()
    alive = torch.cat([half, 1 - half])
    none = worths(torch.ones(1, LAYERS))
    moment = alive.T @ alive / len(alive)
    answer = (alive * (worths(1 - alive) - none)[:, None]).mean(0)
    ones = torch.ones(LAYERS, dtype=torch.float64)
    free, slope = torch.linalg.solve(moment, answer), torch.linalg.solve(moment, ones)
    return free - slope * (free.sum() - (1 - none)) / slope.sum()


def main() -> None:
    """Print mean errors, and how many of the eight lowest layers are found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interaction", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, default=8)
    asked = parser.parse_args()
    worths = game(asked.interaction)
    cut, shapley.NOTHING_LEFT = shapley.NOTHING_LEFT, 1e-4
    exact = by_orders(worths, 200_000, 0)
    shapley.NOTHING_LEFT = cut
    chosen = set(exact.argsort()[:8].tolist())
    print("| models | estimate | mean absolute error | of the 8 lowest, found |\n|---|---|---|---|")
    for samples in (500, 1000, 2000, 4000):
        for name, estimate in (("orders", by_orders), ("KernelSHAP", by_linear_fit)):
            found = [estimate(worths, samples, seed) for seed in range(1, asked.seeds + 1)]
            error = sum(float((one - exact).abs().mean()) for one in found) / len(found)
            hits = sum(len(chosen & set(one.argsort()[:8].tolist())) for one in found) / len(found)
            print(f"| {samples} | {name} | {error:.4f} | {hits:.1f} |")


if __name__ == "__main__":
    main()
