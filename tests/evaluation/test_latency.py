"""Latency: what runs, how often, and what the seconds become."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from slm_plugin.errors import UserError
from slm_plugin.evaluation import latency
from slm_plugin.evaluation.latency import Latency, LatencyOptions, decode
from slm_plugin.evaluation.prefill import prefill, random_prompt
from slm_plugin.session import Session
from tests.tiny import make_model, random_tokens


def measure(session: Session, **options: object) -> dict[str, float]:
    """Values of a latency evaluator by name."""
    evaluator = Latency(LatencyOptions.model_validate(options))
    return {found.name: found.value for found in session.measure(evaluator)}


def run_clock(monkeypatch: pytest.MonkeyPatch, seconds: Iterable[float]) -> None:
    """Let every timed piece of work in turn take these seconds."""

    def times() -> Iterator[float]:
        now = 0.0
        for duration in seconds:
            yield now
            now += duration
            yield now

    ticks = times()
    monkeypatch.setattr(latency, "perf_counter", lambda: next(ticks))


def test_forward_calls_and_tokens_are_counted(session: Session) -> None:
    """Each run is one forward over the prompt and one for every new token."""
    shapes: list[tuple[int, ...]] = []

    def note(_module: nn.Module, _args: Any, settings: dict[str, Any]) -> None:
        shapes.append(tuple(settings["input_ids"].shape))

    session.model.register_forward_pre_hook(note, with_kwargs=True)
    measure(session, prompt_tokens=9, new_tokens=4, batch_size=3, repeats=2, warmup=1)
    assert shapes == 3 * [(3, 9), *(4 * [(3, 1)])]


def test_cached_decode_is_what_generate_writes(family: str) -> None:
    """The timed loop writes the tokens that `generate` writes greedily."""
    model, prompt = make_model(family), random_tokens(2, 10)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    with torch.inference_mode():
        first = prefill(model, prompt)
        token = first.logits[:, -1:].argmax(-1)
        rest = decode(model, token, first.past_key_values, 12)
    expected = model.generate(prompt, do_sample=False, max_new_tokens=13)
    assert torch.equal(torch.cat([prompt, token, rest], dim=1), expected)


def test_end_of_text_does_not_stop_the_loop(session: Session) -> None:
    """A model that writes nothing but end-of-text is still timed for all steps."""
    session.view.head.weight.data.zero_()
    session.model.config.eos_token_id = 0
    with torch.inference_mode():
        first = prefill(session.model, random_tokens(1, 5))
        written = decode(session.model, torch.tensor([[0]]), first.past_key_values, 6)
    assert written.tolist() == [[0] * 6]


def test_seconds_become_figures(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    """Medians over the timed runs, warm-up left out, give the four figures."""
    runs = [(9, 9), (2, 4), (1, 8), (4, 2)]
    run_clock(monkeypatch, [seconds for run in runs for seconds in run])
    found = measure(session, prompt_tokens=10, new_tokens=8, batch_size=2, repeats=3, warmup=1)
    assert found == {
        "prefill speed": pytest.approx(2 * 10 / 2),
        "prefill time": pytest.approx(2000),
        "decode speed": pytest.approx(2 * 8 / 4),
        "decode time per step": pytest.approx(4000 / 8),
    }


def test_directions_and_protocol(session: Session) -> None:
    """Speeds are better high, times better low; the protocol has every option."""
    options = LatencyOptions(prompt_tokens=7, new_tokens=2, batch_size=3, repeats=1, warmup=0)
    found = Latency(options).measure(session)
    assert [m.better for m in found] == ["higher", "lower", "higher", "lower"]
    assert [m.unit for m in found] == ["tokens/s", "ms", "tokens/s", "ms"]
    for part in ("batch 3", "prompt of 7 tokens", "2 greedy steps", "median of 1", "0 warm-up"):
        assert part in found[0].protocol
    assert "float32" in found[0].protocol


def test_prompt_is_seeded(session: Session) -> None:
    """The same seed gives the same prompt, another seed another one."""
    same = random_prompt(session, 2, 20)
    assert torch.equal(same, random_prompt(session, 2, 20))
    session.seed += 1
    assert not torch.equal(same, random_prompt(session, 2, 20))


def test_room_is_the_model_s_positions(session: Session) -> None:
    """Prompt and new tokens may fill the positions and not exceed them."""
    measure(session, prompt_tokens=254, new_tokens=2, repeats=1, warmup=0)
    with pytest.raises(UserError, match="needs 257 positions and the model has 256"):
        measure(session, prompt_tokens=255, new_tokens=2, repeats=1, warmup=0)


def test_repeats_that_differ_show_as_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """The standard error is that of the timed repeats, warm-up left out; one repeat has none."""
    seconds = iter([(9.0, 9.0), (1.0, 2.0), (2.0, 2.0), (3.0, 2.0)] * 2)
    monkeypatch.setattr(latency, "time_run", lambda *_: next(seconds))
    session = Session(make_model())
    options = LatencyOptions(prompt_tokens=4, new_tokens=2, repeats=3, warmup=1)
    found = {m.name: m for m in Latency(options).measure(session)}
    assert found["prefill time"].value == pytest.approx(2000)
    assert found["prefill time"].stderr == pytest.approx(1000 / 3**0.5)
    assert found["prefill speed"].stderr == pytest.approx(2 / 3**0.5 / 2)
    assert found["decode time per step"].stderr == 0
    once = LatencyOptions(prompt_tokens=4, new_tokens=2, repeats=1, warmup=1)
    assert all(m.stderr is None for m in Latency(once).measure(session))
