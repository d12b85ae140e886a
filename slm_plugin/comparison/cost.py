"""What a method itself takes: its time, and the memory that it needs beside the model."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TypeVar

from slm_plugin.comparison.record import Effort
from slm_plugin.evaluation.footprint import added_memory
from slm_plugin.lazy import torch
from slm_plugin.session import Session

T = TypeVar("T")


def effort_of(session: Session, work: Callable[[], T]) -> tuple[T, Effort]:
    """Do a piece of work on a session, and note what it took.

    The memory is what `added_memory` finds: the models that a comparison holds besides do not
    count.
    """
    device = session.model.device
    done: list[tuple[T, float]] = []
    known = session.known_trials

    def timed() -> None:
        started = perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done.append((result, perf_counter() - started))

    added = added_memory(device, timed)
    ((result, seconds),) = done
    known = session.known_trials - known
    memory = None if added is None else added[1]
    return result, Effort(seconds=seconds, memory=memory, known_trials=known)
