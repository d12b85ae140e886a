"""One threshold over the channels of all layers."""

from __future__ import annotations

import pytest
import torch

from slm_plugin.plans import UnitScores
from slm_plugin.pruners.width.allocation.pooled import pooled


def scores(*layers: list[float]) -> list[UnitScores]:
    """Scores of MLP channels."""
    return [
        UnitScores(layer=layer, unit="mlp_channel", scores=tuple(values))
        for layer, values in enumerate(layers)
    ]


def test_one_threshold_takes_the_lowest_of_all_layers() -> None:
    """Against sorting all standardised scores; scaling a layer changes nothing."""
    generator = torch.Generator().manual_seed(2)
    raw = [torch.rand(size, generator=generator).double() for size in (20, 20, 30)]
    raw[1] = raw[1] ** 4
    given = scores(*(one.tolist() for one in raw))
    standard = [(one - one.mean()) / one.std(correction=0) for one in raw]
    for removed in (1, 25, 70):
        bound = float(torch.cat(standard).sort().values[removed - 1])
        wanted = [sum(value <= bound for value in one.tolist()) / len(one) for one in standard]
        assert pooled(given, removed) == pytest.approx(wanted)
    assert pooled(given, 0) == [0.0] * 3
    louder = scores((1000 * raw[0] + 3).tolist(), raw[1].tolist(), raw[2].tolist())
    assert pooled(louder, 25) == pytest.approx(pooled(given, 25))


def test_a_layer_of_equal_scores_stands_at_its_mean() -> None:
    """No division by 0."""
    assert pooled(scores([5.0] * 4, [1.0, 2.0, 3.0, 40.0]), 3) == [0.0, 0.75]
