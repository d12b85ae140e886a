"""Scores of the inputs of a projection from its weight and what it sees; a function each.

Each takes the inputs of ``down_proj`` or ``o_proj`` of one layer and returns one value per input
column. The score of a KV group is the sum over its columns.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from slm_plugin.lazy import torch
from slm_plugin.pruners.input_sums import InputSums, ReaderInputs, gram

if TYPE_CHECKING:
    from torch import Tensor

# The ridge of leverage scores, relative to the mean of the Gram matrix's diagonal.
LEVERAGE_RIDGE = 1.0
# Rounds in which `contribution` removes columns, if there are batches enough.
ROUNDS = 8


def wanda_sp(inputs: ReaderInputs) -> Tensor:
    """Mean over the rows i of ``|W_ij| * sqrt(E[x_j^2])``, ``(features,)``.

    Source: structured Wanda as released with FLAP (An et al. 2024, arXiv 2312.11983), after Sun et
        al. 2024 (arXiv 2306.11695), equation 1. FLAP's WIFN is the same score: both rank the
        columns of one layer alike.
    """
    sums = InputSums(inputs)
    return inputs.weight.abs().mean(0).cpu() * (sums.squares / sums.tokens).sqrt()


def flap(inputs: ReaderInputs) -> Tensor:
    """Fluctuation: ``Var[x_j] * ||W_:,j||^2``, ``(features,)``; squared for the attention.

    A column that is constant costs nothing where its mean can go into a bias. The classes that
    most checkpoints have hold no such bias; a fit of the kept columns takes its place.

    Source: An et al. 2024, FLAP (arXiv 2312.11983), section 3.2, WIFV. The released code squares
        the values of attention columns before it averages them over a head.
    """
    found = InputSums(inputs).variance * inputs.weight.square().sum(0).cpu()
    return found.square() if inputs.name == "o_proj" else found


def activation(inputs: ReaderInputs) -> Tensor:
    """Root of the sum over samples of the squared mean of ``|x_j|``, ``(features,)``.

    It does not look at the weights that read the column. The norm over a head's columns, by which
    Minitron ranks heads, orders them as the sum of squares; `width` sums the values themselves.

    Source: Muralidharan et al. 2024, Minitron (arXiv 2407.14679), section 3.1, mean over the
        sequence and L2 norm over the batch.
    """
    return InputSums(inputs).sample_means.sqrt()


def leverage(inputs: ReaderInputs) -> Tensor:
    """Ridge leverage ``[C (C + a I)^-1]_jj`` of the Gram matrix C, ``(features,)``, in 0..1.

    A column that the others predict has little leverage, however large it is. ``a`` is the mean of
    the diagonal.

    Source: Lin et al. 2024, MoDeGPT (arXiv 2408.09632), its step for the MLP; there with ``a = 1``,
        which depends on the number of tokens.
    """
    fitted, held_out = gram(inputs)
    whole = fitted + held_out
    ridge = LEVERAGE_RIDGE * whole.diagonal().mean()
    if not ridge > 0:
        return torch.zeros(len(whole), dtype=whole.dtype)
    whole.diagonal().add_(ridge)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(whole))
    return (1 - ridge * inverse.diagonal()).cpu()


def contribution(inputs: ReaderInputs, removed: int) -> Tensor:
    """Error of the projection's output if a column went too, while columns go in rounds.

    With s what the columns removed so far leave out, ``s = sum_k a_k W_:,k``, the score of column j
    is the mean over tokens of ``||s + a_j W_:,j||``. After each part of the calibration set its
    share of the columns goes. A removed column keeps the score with which it went, and all that
    stay score above the removed ones.

    Args:
        inputs: The inputs.
        removed: Number of columns that will go.

    Returns:
        ``(features,)``: the order of removal, from 0, then the order of the scores of the others.

    Source: the contribution scores of NVIDIA ModelOpt (``importance_hooks``); there each round
        looks at one batch alone, here likewise, in at most ROUNDS rounds.
    """
    weight = inputs.weight
    norms = weight.square().sum(0)
    count = weight.shape[1]
    alive = torch.ones(count, dtype=torch.bool, device=weight.device)
    order: list[int] = []
    rounds = min(ROUNDS, inputs.count)
    scores = torch.zeros_like(norms)
    for number, batch in enumerate(inputs.batches(), start=1):
        rows = batch.flatten(0, 1)
        left_out = rows[:, ~alive] @ weight[:, ~alive].T
        squared = (
            left_out.square().sum(1, keepdim=True)
            + 2 * rows * (left_out @ weight)
            + rows.square() * norms
        )
        scores += squared.clamp(min=0).sqrt().sum(0)
        finished = number * rounds // inputs.count
        if finished > (number - 1) * rounds // inputs.count:
            ranked = torch.where(alive, scores, torch.inf).argsort(stable=True)
            gone = ranked[: removed * finished // rounds - len(order)]
            order += gone.tolist()
            alive[gone] = False
            rest = [column for column in ranked.tolist() if alive[column]]
            scores = torch.zeros_like(norms)
    places = torch.empty(count, dtype=torch.float64)
    places[torch.tensor([*order, *rest])] = torch.arange(count, dtype=torch.float64)
    return places


def group_contribution(inputs: ReaderInputs, size: int) -> Tensor:
    """Mean over tokens of ``||W_:,G x_G||`` of each group of consecutive columns, ``(groups,)``.

    Args:
        inputs: The inputs.
        size: Columns of a group.

    Source: the contribution scores of NVIDIA ModelOpt for KV heads.
    """
    weight = inputs.weight
    total, tokens = torch.zeros(weight.shape[1] // size, dtype=weight.dtype), 0
    for batch in inputs.batches():
        rows = batch.flatten(0, 1)
        for group in range(len(total)):
            here = slice(group * size, (group + 1) * size)
            total[group] += (rows[:, here] @ weight[:, here].T).norm(dim=1).sum().cpu()
        tokens += len(rows)
    return total / tokens
