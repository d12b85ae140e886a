"""Measure the times of pruned shapes: random weights, in turns, remembered."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import TYPE_CHECKING, Any

from slm_plugin.cache import Store, hashed
from slm_plugin.evaluation.latency import time_run
from slm_plugin.evaluation.prefill import check_room, random_prompt
from slm_plugin.extras import found_version
from slm_plugin.progress import track
from slm_plugin.pruners.hybrid.shapes import Shape
from slm_plugin.pruners.hybrid.stand_ins import stand_ins
from slm_plugin.pruners.hybrid.workload import Workload
from slm_plugin.versions import machine

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

    from slm_plugin.session import Session

# Packages that a time depends on.
_VERSIONS = ("slm-plugin", "torch", "transformers", "optimum-onnx", "onnxruntime")
# Seconds of one prefill and of the steps after it.
Run = Callable[[], tuple[float, float]]
Timer = Callable[["PreTrainedModel", "Tensor", int], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Times:
    """Median times of a shape, in seconds.

    Attributes:
        prefill: Of the prompt.
        decode: Of all steps after it.
    """

    prefill: float
    decode: float


def measure(
    session: Session,
    workload: Workload,
    shapes: Sequence[Shape],
    *,
    repeats: int = 5,
    timer: Timer = time_run,
) -> dict[Shape, Times]:
    """Time models of some shapes in turns, as `latency` times a model.

    After one run of each that does not count, a round times each of them once, in an order that
    changes from round to round; medians over the rounds are returned. The models are of the
    session's class, dtype and device. Their weights are random and share one block of memory, so
    that a measurement needs as much as the largest of the shapes, beside the session's model. With
    ``backend: onnxruntime`` all graphs lie in a temporary folder, as float32, and one of them at a
    time is in memory.

    Every run is written to the session's journal folder at once: an interrupted measurement goes
    on with the runs that are missing, and the next one with the same model, workload, machine and
    versions repeats nothing.

    Args:
        session: Holds the model, which stays as it is.
        workload: What is run.
        shapes: Shapes that the model can be pruned to.
        repeats: Rounds that count.
        timer: Times one run of a model on a prompt, ``(batch, tokens)``, and the steps after it;
            for PyTorch.

    Raises:
        UserError: The prompt and the new tokens exceed the model's positions.
        UnsupportedModelError: A shape is none of this model's, or cannot be exported.
        MissingExtraError: The backend is not installed.
        OutputError: The journal cannot be written.
    """
    check_room(session.model, workload.positions, "timing", "`prompt_tokens` and `new_tokens`")
    store = _store(session, workload)
    wanted = list(dict.fromkeys(shapes))
    missing = [shape for shape in wanted if _rounds(store, shape, repeats)]
    if missing:
        with _runs(session, workload, missing, timer) as runs:
            _in_turns(runs, store, repeats)
    return {shape: _medians(store, shape, repeats) for shape in wanted}


def _in_turns(runs: Mapping[Shape, Run], store: Store, repeats: int) -> None:
    for run in runs.values():
        run()
    order, shuffler = list(runs), random.Random(1234)
    for number in track(range(repeats), "timing"):
        shuffler.shuffle(order)
        for shape in order:
            if number in _rounds(store, shape, repeats):
                store.store(_key(shape, number), runs[shape]())


def _rounds(store: Store, shape: Shape, repeats: int) -> list[int]:
    """Rounds of a shape that are not measured yet."""
    return [number for number in range(repeats) if store.find(_key(shape, number)) is None]


def _medians(store: Store, shape: Shape, repeats: int) -> Times:
    found = [store.find(_key(shape, number)) for number in range(repeats)]
    prefill, decode = zip(*found, strict=True)
    return Times(median(prefill), median(decode))


def _key(shape: Shape, number: int) -> list[int]:
    return [shape.layers, shape.mlp_width, shape.kv_groups, number]


@contextmanager
def _runs(
    session: Session, workload: Workload, shapes: Sequence[Shape], timer: Timer
) -> Iterator[dict[Shape, Run]]:
    """What times each shape once."""
    prompt = random_prompt(session, workload.batch_size, workload.prompt_tokens)
    if workload.backend == "onnxruntime":
        from slm_plugin.pruners.hybrid.onnx_timing import graphs

        with graphs(session, shapes) as made:
            yield {
                shape: partial(graph.time_run, prompt.cpu(), workload.new_tokens)
                for shape, graph in made.items()
            }
        return
    model = session.model
    models = stand_ins(session.view, shapes, model.dtype, model.device)
    yield {
        shape: partial(timer, one, prompt, workload.new_tokens)
        for shape, one in zip(shapes, models, strict=True)
    }


def _store(session: Session, workload: Workload) -> Store:
    """The times in the session's journal folder, by all that they depend on."""
    if session.journals is None:
        return Store()
    model = session.model
    facts = (
        "times of shapes, 1",
        type(model).__name__,
        session.view.dimensions().model_dump_json(),
        model.config.to_json_string(use_diff=False),
        model.config._attn_implementation,
        workload.model_dump_json(),
        workload.dtype(model.dtype),
        session.seed,
        machine(),
        os.cpu_count(),
        model.device,
        *(found_version(name) for name in _VERSIONS),
    )
    return Store.of(session.journals, hashed(facts), _is_time)


def _is_time(key: Any, value: Any) -> bool:
    """Whether a key has two times."""
    return (
        isinstance(key, list)
        and [type(one) for one in key] == [int] * 4
        and isinstance(value, list)
        and [type(one) for one in value] == [float] * 2
        and min(value) > 0
    )
