"""What a layer costs: kinds share a time, rounds are kept, and what costs the same is no cost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from slm_plugin.errors import UserError
from slm_plugin.evaluation.prefill import Prompts
from slm_plugin.pruners.depth.measures.layer_costs import (
    ROUNDS,
    described,
    layer_costs,
    layer_seconds,
)
from slm_plugin.session import Session
from tests.tiny import make_model

PROMPTS = Prompts(prompt_tokens=6, new_tokens=3, batch_size=2)


class Clock:
    """A timer of planted times, that notes what it was asked and stops as a kill does."""

    def __init__(self, *rounds: list[float], most: int = 10**6) -> None:
        self.asked: list[tuple[tuple[int, ...], int]] = []
        self._rounds, self._most = rounds, most

    def __call__(self, session: Session, prompt: torch.Tensor, steps: int) -> list[float]:
        """The next of the rounds; the last one again and again."""
        if len(self.asked) == self._most:
            raise KeyboardInterrupt
        self.asked.append((tuple(prompt.shape), steps))
        return self._rounds[min(len(self.asked), len(self._rounds)) - 1]


def mixed(journals: Path | None = None) -> Session:
    """Six layers, of which the third and the last attend to all tokens."""
    return Session(make_model("gemma3"), journals=journals)


def test_layers_of_one_kind_share_the_mean_of_their_medians() -> None:
    """Over the rounds behind the first; the costs have mean 1."""
    slow = [[9.0] * 6, [1.0, 1.0, 4.0, 1.0, 1.0, 4.0], [1.0, 3.0, 4.0, 3.0, 1.0, 4.0]]
    clock = Clock(*slow)
    costs = layer_costs(mixed(), "latency", PROMPTS, timer=clock)
    # Medians of the layers are 1, 3, 4, 3, 1, 4.
    assert costs == pytest.approx([0.75, 0.75, 1.5, 0.75, 0.75, 1.5])
    assert clock.asked == [((2, 6), 3)] * (ROUNDS + 1)
    assert described(costs).endswith("0.750 of layers 0, 1, 3, 4; 1.500 of layers 2, 5")


def test_what_costs_the_same_costs_nothing() -> None:
    """One kind is not timed at all; equal times and equal sizes tell nothing apart."""
    tiny = Session(make_model("llama"))
    assert layer_costs(tiny, "latency", PROMPTS, timer=Clock(most=0)) == ()
    assert layer_costs(mixed(), "latency", PROMPTS, timer=Clock([2.0] * 6)) == ()
    assert layer_costs(mixed(), "parameter", PROMPTS) == ()
    assert layer_costs(mixed(), "layer", PROMPTS) == ()
    assert "decides nothing" in described(())


def test_parameters_are_counted_where_layers_differ() -> None:
    """Here a bias more in one of them."""
    tiny = Session(make_model("llama"))
    layer = tiny.view.layers[1]
    size = sum(p.numel() for p in layer.parameters())
    layer.register_parameter("more", torch.nn.Parameter(torch.zeros(size)))
    assert layer_costs(tiny, "parameter", PROMPTS) == pytest.approx(
        [6 / 7, 12 / 7, 6 / 7, 6 / 7, 6 / 7, 6 / 7]
    )


def test_a_killed_measurement_goes_on(tmp_path: Path) -> None:
    """With the rounds that it had; the next session measures nothing."""
    rounds = [[float(n + (layer in (2, 5))) for layer in range(6)] for n in range(1, 8)]
    with pytest.raises(KeyboardInterrupt):
        layer_costs(mixed(tmp_path), "latency", PROMPTS, timer=Clock(*rounds, most=3))
    clock = Clock(*rounds)
    found = layer_costs(mixed(tmp_path), "latency", PROMPTS, timer=clock)
    assert len(clock.asked) == 1 + ROUNDS - 2
    assert layer_costs(mixed(tmp_path), "latency", PROMPTS, timer=Clock(most=0)) == found
    longer = Prompts(prompt_tokens=7)
    with pytest.raises(KeyboardInterrupt):
        layer_costs(mixed(tmp_path), "latency", longer, timer=Clock(most=0))


def test_the_timer_leaves_the_model_as_it_was() -> None:
    """Every layer takes some of the time, and no hook stays."""
    tiny = mixed()
    prompt = torch.ones(2, 6, dtype=torch.long)
    seconds = layer_seconds(tiny, prompt, 3)
    assert len(seconds) == 6 and min(seconds) > 0
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in tiny.view.layers)


def test_a_prompt_beyond_the_positions_is_refused() -> None:
    """Before anything is timed."""
    with pytest.raises(UserError, match="timing needs 10003 positions and the model has"):
        layer_costs(mixed(), "latency", Prompts(prompt_tokens=9971), timer=Clock(most=0))
