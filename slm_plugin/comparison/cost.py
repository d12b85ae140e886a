"""Cost of a method: its time, and the memory that it needs in addition to the model."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import TypeVar

from slm_plugin.comparison.record import Cost
from slm_plugin.evaluation.footprint import added_memory
from slm_plugin.lazy import torch
from slm_plugin.session import Session

T = TypeVar("T")


def measure_cost(session: Session, work: Callable[[], T]) -> tuple[T, Cost]:
    """Run a function on a session, and measure its time and memory.

    Memory is measured by `added_memory`: it does not include what was allocated before.
    """
    device = session.model.device
    done: list[tuple[T, float]] = []
    known_before = session.known_trials

    def timed() -> None:
        started = perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done.append((result, perf_counter() - started))

    added = added_memory(device, timed)
    ((result, seconds),) = done
    known = session.known_trials - known_before
    memory = None if added is None else added[1]
    return result, Cost(seconds=seconds, memory=memory, known_trials=known)
