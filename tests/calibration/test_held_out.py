"""Which samples no fit uses."""

import torch

from slm_plugin.calibration.held_out import held_out, held_out_count, is_held_out


def test_the_count_is_that_of_the_samples_held_out() -> None:
    """So that what a warning counts is what a fit uses."""
    for samples in range(12):
        assert held_out_count(samples) == int(is_held_out(torch.arange(samples)).sum())


def test_batches_of_any_size_hold_out_the_same_samples() -> None:
    """The batch size changes no fit."""
    whole = torch.arange(11)
    for size in range(1, 12):
        found = torch.cat(list(held_out(whole.split(size))))
        assert found.tolist() == [0, 5, 10]
