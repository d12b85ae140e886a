"""Latency: speed of prefill and of greedy decoding."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import median, stdev
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, ClassVar, TypeVar

from pydantic import Field

from slm_plugin.counts import Count, Natural
from slm_plugin.evaluation.base import Evaluator, EvaluatorOptions, Measurement
from slm_plugin.evaluation.prefill import Prompts, prefill, random_prompt
from slm_plugin.lazy import inference_mode, torch
from slm_plugin.progress import track
from slm_plugin.registry import register_evaluator

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from slm_plugin.session import Session

T = TypeVar("T")


class LatencyOptions(EvaluatorOptions, Prompts):
    """Prompt, steps and repeats of the timing."""

    repeats: Annotated[Count, Field(description="timed runs; medians are reported")] = 5
    warmup: Annotated[Natural, Field(description="runs before the timed ones")] = 1


@register_evaluator("latency")
class Latency(Evaluator):
    """Prefill and decode speed, timed separately.

    Prefill is one forward pass over a random prompt that fills the key/value cache and scores the
    last position. Decode is a plain greedy loop over that cache, one token a step for each prompt,
    that does not stop at end-of-text. Sampling and the bookkeeping of ``generate`` are left out,
    so that the figures tell models apart and nothing else.
    """

    unlisted: ClassVar[bool] = True
    Options = LatencyOptions
    options: LatencyOptions

    def check_model(self, session: Session) -> None:
        """Check that prompt and answer fit the model's positions.

        Raises:
            UserError: They do not.
        """
        self.options.check_room(session.model, "latency")

    def measure(self, session: Session) -> list[Measurement]:
        """Time prefill and decode.

        Raises:
            UserError: Prompt and new tokens exceed the model's positions.
        """
        options, model = self.options, session.model
        self.check_model(session)
        prompt = random_prompt(session, options.batch_size, options.prompt_tokens)
        runs = [
            time_run(model, prompt, options.new_tokens)
            for _ in track(range(options.warmup + options.repeats), "latency")
        ][options.warmup :]
        reading, writing = zip(*runs, strict=True)
        return self._measurements(reading, writing, model)

    def _measurements(
        self, reading: Sequence[float], writing: Sequence[float], model: PreTrainedModel
    ) -> list[Measurement]:
        """Median figures, with standard errors over the repeats."""
        options = self.options
        protocol = (
            f"batch {options.batch_size}, random prompt of {options.prompt_tokens} tokens, "
            f"{options.new_tokens} greedy steps with KV cache, median of {options.repeats} after "
            f"{options.warmup} warm-up, {_place(model)}"
        )
        read = options.batch_size * options.prompt_tokens
        written = options.batch_size * options.new_tokens
        figures = (
            ("prefill speed", read / median(reading), "tokens/s", _spread(reading)),
            ("prefill time", 1000 * median(reading), "ms", _spread(reading)),
            ("decode speed", written / median(writing), "tokens/s", _spread(writing)),
            (
                "decode time per step",
                1000 * median(writing) / options.new_tokens,
                "ms",
                _spread(writing),
            ),
        )
        return [
            Measurement(
                name=name,
                value=value,
                unit=unit,
                protocol=protocol,
                better="lower" if unit == "ms" else "higher",
                stderr=None if spread is None else value * spread,
            )
            for name, value, unit, spread in figures
        ]


def _spread(seconds: Sequence[float]) -> float | None:
    """Standard error of the repeats as a share of their median."""
    if len(seconds) < 2:
        return None
    return stdev(seconds) / math.sqrt(len(seconds)) / median(seconds)


@inference_mode
def time_run(model: PreTrainedModel, prompt: Tensor, steps: int) -> tuple[float, float]:
    """Seconds of one prefill and of the greedy steps that follow it."""
    reading, first = timed(model.device, lambda: prefill(model, prompt))
    token = first.logits[:, -1:].argmax(-1)
    writing, _ = timed(model.device, lambda: decode(model, token, first.past_key_values, steps))
    return reading, writing


@inference_mode
def decode(model: PreTrainedModel, token: Tensor, cache: object, steps: int) -> Tensor:
    """Decode greedily from tokens ``(rows, 1)``; returns the new tokens, ``(rows, steps)``."""
    found = []
    for _ in range(steps):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        token, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
        found.append(token)
    return torch.cat(found, dim=1)


def timed(device: torch.device, work: Callable[[], T]) -> tuple[float, T]:
    """Seconds of some work on a device, and its result."""
    synchronise(device)
    start = perf_counter()
    result = work()
    synchronise(device)
    return perf_counter() - start, result


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished; a no-op on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _place(model: PreTrainedModel) -> str:
    dtype = str(model.dtype).removeprefix("torch.")
    if model.device.type == "cuda":
        return f"{torch.cuda.get_device_name(model.device)}, {dtype}"
    if model.device.type == "cpu":
        return f"CPU with {torch.get_num_threads()} threads, {dtype}"
    return f"{model.device.type}, {dtype}"
