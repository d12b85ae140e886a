"""The rate, the order and the refusal that recoveries share."""

from __future__ import annotations

import math

import pytest
import torch

from slm_plugin.errors import NumericalError
from slm_plugin.recovery.training.loop import refuse_non_finite, shuffled, warmup_cosine


@pytest.mark.parametrize(("steps", "warmup"), [(40, 0.1), (40, 0.0), (1, 0.5), (7, 0.9)])
def test_the_rate_rises_to_its_peak_and_falls_to_its_floor(steps: int, warmup: float) -> None:
    """Along a line up and along half a cosine down, by their formulas."""
    optimizer = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], lr=0.8)
    schedule = warmup_cosine(optimizer, steps, warmup, 0.2)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    rises = max(1, round(warmup * steps))
    for step, rate in enumerate(rates):
        if step < rises:
            start = 1 / (rises + 1)
            expected = 0.8 * (start + (1 - start) * step / rises)
        else:
            part = (step - rises) / max(1, steps - rises)
            expected = 0.2 + 0.6 * (1 + math.cos(math.pi * part)) / 2
        assert rate == pytest.approx(expected)


def test_an_epoch_sees_everything_once_and_another_order_each_time() -> None:
    """The seed alone decides the order."""
    found = []
    for _ in range(2):
        generator = torch.Generator().manual_seed(3)
        found.append([torch.cat(list(shuffled(torch.arange(9), 4, generator))) for _ in range(2)])
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert not torch.equal(found[0][0], found[0][1])
    assert all(torch.equal(order.sort().values, torch.arange(9)) for order in found[0])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_no_number_is_refused(bad: float) -> None:
    """With the recovery's name."""
    with pytest.raises(NumericalError, match="training loss of someone"):
        refuse_non_finite(torch.tensor(bad), "someone")
    refuse_non_finite(torch.tensor(1.0), "someone")
