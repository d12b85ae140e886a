"""What each layer costs: that by which a search divides what the model loses without it.

Source: SPRINT (arXiv 2506.03510) divides by the time that a candidate saves.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from statistics import fmean, median
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from slm_plugin.evaluation.latency import synchronise, time_run
from slm_plugin.evaluation.prefill import Prompts, random_prompt
from slm_plugin.models.view import layer_kinds
from slm_plugin.progress import track
from slm_plugin.pruners.trial_store import time_store

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session

Per = Literal["layer", "parameter", "latency"]
# Timed runs, whose medians count; one more goes before them.
ROUNDS = 5
Timer = Callable[["Session", "Tensor", int], list[float]]


def layer_seconds(session: Session, prompt: Tensor, steps: int) -> list[float]:
    """Seconds in each layer during one prefill of ``(batch, tokens)`` and greedy steps after it."""
    seconds = [0.0] * len(session.view.layers)

    def add(index: int, sign: int, *_: Any) -> None:
        synchronise(session.model.device)
        seconds[index] += sign * perf_counter()

    with ExitStack() as hooks:
        for index, layer in enumerate(session.view.layers):
            enters, leaves = partial(add, index, -1), partial(add, index, 1)
            hooks.callback(layer.register_forward_pre_hook(enters, prepend=True).remove)
            hooks.callback(layer.register_forward_hook(leaves).remove)
        time_run(session.model, prompt, steps)
    return seconds


def layer_costs(
    session: Session, per: Per, prompts: Prompts, *, timer: Timer = layer_seconds
) -> tuple[float, ...]:
    """What each layer costs, as a share of the mean; empty where all cost the same.

    Layers of one kind, as many parameters and the same attention, share the mean of their times, so
    that noise tells none of them apart; where all are of one kind nothing is timed. Rounds are
    written to the session's journal folder, so that a killed search goes on with the same times.

    Args:
        session: Holds the model.
        per: The unit: layers, parameters, or seconds of a prefill and greedy steps.
        prompts: What is timed.
        timer: Gives the seconds of every layer in one run.

    Raises:
        UserError: The prompt and the new tokens exceed the model's positions.
        OutputError: The journal cannot be written.
    """
    if per == "layer":
        return ()
    costs = [float(sum(p.numel() for p in layer.parameters())) for layer in session.view.layers]
    kinds = list(zip(costs, layer_kinds(session.view), strict=True))
    if per == "latency" and len(set(kinds)) > 1:
        costs = _times(session, prompts, kinds, timer)
    mean = fmean(costs)
    return tuple(cost / mean for cost in costs) if len(set(costs)) > 1 else ()


def described(costs: Sequence[float]) -> str:
    """Costs in words, with the layers that have each."""
    if not costs:
        return "all layers cost the same, so it decides nothing"
    layers: dict[float, list[int]] = defaultdict(list)
    for index, cost in enumerate(costs):
        layers[cost].append(index)
    parts = (
        f"{cost:.3f} of layers {', '.join(map(str, found))}"
        for cost, found in sorted(layers.items())
    )
    return f"what is lost is divided by a layer's cost, as a share of the mean: {'; '.join(parts)}"


def _times(
    session: Session, prompts: Prompts, kinds: Sequence[object], timer: Timer
) -> list[float]:
    """Seconds of each layer, the mean over those of its kind."""
    prompts.check_room(session.model, "timing")
    about, valid = ("layers", prompts.model_dump_json()), partial(_is_round, len(kinds))
    store = time_store(session, about, valid)
    missing = [number for number in range(ROUNDS) if store.find(number) is None]
    if missing:
        prompt = random_prompt(session, prompts.batch_size, prompts.prompt_tokens)
        timer(session, prompt, prompts.new_tokens)
        for number in track(missing, "timing layers", len(missing)):
            store.store(number, timer(session, prompt, prompts.new_tokens))
    rounds = [store.find(number) for number in range(ROUNDS)]
    of_kind: dict[object, list[float]] = defaultdict(list)
    for kind, seconds in zip(kinds, zip(*rounds, strict=True), strict=True):
        of_kind[kind].append(median(seconds))
    return [fmean(of_kind[kind]) for kind in kinds]


def _is_round(layers: int, key: Any, value: Any) -> bool:
    """Whether a key is a round's number, with a time of every layer."""
    return (
        type(key) is int
        and isinstance(value, list)
        and [type(one) for one in value] == [float] * layers
        and min(value) > 0
    )
