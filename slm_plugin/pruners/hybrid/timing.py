"""Measure the times of pruned shapes: random weights, in turns, remembered."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from slm_plugin.cache import Store
from slm_plugin.evaluation.latency import time_run
from slm_plugin.evaluation.prefill import random_prompt
from slm_plugin.lazy import np
from slm_plugin.progress import track
from slm_plugin.pruners.hybrid.shapes import Shape
from slm_plugin.pruners.hybrid.stand_ins import stand_ins
from slm_plugin.pruners.hybrid.workload import Workload
from slm_plugin.pruners.trial_store import time_store

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor
    from transformers import PreTrainedModel

    from slm_plugin.session import Session

# Seconds of one prefill and of the steps after it.
Run = Callable[[], tuple[float, float]]
Timer = Callable[["PreTrainedModel", "Tensor", int], tuple[float, float]]


@dataclass(frozen=True, slots=True)
class Times:
    """Times of a shape, in seconds.

    Attributes:
        prefill: Of the prompt.
        decode: Of all steps after it.
    """

    prefill: float
    decode: float

    def of(self, phase: Literal["prefill", "decode"]) -> float:
        """Seconds of one of the two, as a target names it."""
        return self.prefill if phase == "prefill" else self.decode


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
    changes from round to round. How much slower the machine was in a round as a whole is
    estimated by the median over the shapes and divided out; medians over the rounds are returned.

    The models are of the session's class, dtype and device. Their weights are random and share one
    block of memory, so that a measurement needs as much as the largest of the shapes, beside the
    session's model. With ``backend: onnxruntime`` all graphs lie in a temporary folder, as float32,
    and one of them at a time is in memory.

    Every round is written to the session's journal folder at once: an interrupted measurement goes
    on with the rounds that are missing, and the next one of the same shapes of the same model, with
    the same workload, machine and versions, measures nothing. Another set of shapes is measured
    anew, because times of different hours do not compare.

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
        TargetError: No model of a shape can be made of it.
        MissingExtraError: The backend is not installed.
        OutputError: The journal cannot be written.
    """
    workload.check_room(session.model, "timing")
    wanted = list(dict.fromkeys(shapes))
    store = _store(session, workload, wanted)
    missing = [number for number in range(repeats) if store.find(number) is None]
    if missing:
        with _runs(session, workload, wanted, timer) as runs:
            _in_turns(runs, store, missing)
    seconds = steady([store.find(number) for number in range(repeats)])
    return {
        shape: Times(float(prefill), float(decode))
        for shape, (prefill, decode) in zip(wanted, seconds, strict=True)
    }


def steady(rounds: Sequence[Any]) -> NDArray[np.float64]:
    """Medians over rounds, without what all of a round have in common.

    Args:
        rounds: Seconds of each round, ``(shapes, phases)``.

    Returns:
        Seconds, ``(shapes, phases)``.
    """
    logs = np.log(np.array(rounds))
    slower = np.median(logs - np.median(logs, axis=0), axis=1, keepdims=True)
    found: NDArray[np.float64] = np.exp(np.median(logs - slower, axis=0))
    return found


def _in_turns(runs: Sequence[Run], store: Store, missing: Sequence[int]) -> None:
    for run in runs:
        run()
    for number in track(missing, "timing", len(missing)):
        order = random.Random(number).sample(range(len(runs)), len(runs))
        found = {index: runs[index]() for index in order}
        store.store(number, [list(found[index]) for index in range(len(runs))])


@contextmanager
def _runs(
    session: Session, workload: Workload, shapes: Sequence[Shape], timer: Timer
) -> Iterator[list[Run]]:
    """What times each shape once."""
    prompt = random_prompt(session, workload.batch_size, workload.prompt_tokens)
    if workload.backend == "onnxruntime":
        from slm_plugin.pruners.hybrid.onnx_timing import graphs

        with graphs(session, shapes) as made:
            yield [partial(one.time_run, prompt.cpu(), workload.new_tokens) for one in made]
        return
    model = session.model
    models = stand_ins(session.view, shapes, model.dtype, model.device)
    yield [partial(timer, one, prompt, workload.new_tokens) for one in models]


def _store(session: Session, workload: Workload, shapes: Sequence[Shape]) -> Store:
    """The rounds in the session's journal folder, by all that they depend on."""
    about = (shapes, workload.model_dump_json())
    return time_store(session, about, partial(_is_round, len(shapes)))


def _is_round(shapes: int, key: Any, value: Any) -> bool:
    """Whether a key is a round's number, with two times of every shape."""
    return (
        type(key) is int
        and isinstance(value, list)
        and len(value) == shapes
        and all(isinstance(one, list) and [type(t) for t in one] == 2 * [float] for one in value)
        and min(map(min, value)) > 0
    )
