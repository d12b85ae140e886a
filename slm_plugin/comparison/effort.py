"""What a method itself takes: its time, and the memory that it needs beside the model."""

from __future__ import annotations

import ctypes
import gc
import re
from collections.abc import Callable
from contextlib import suppress
from time import perf_counter
from typing import TypeVar

import torch

from slm_plugin.comparison.record import Effort
from slm_plugin.evaluation.footprint import STATUS, peak_memory
from slm_plugin.session import Session

T = TypeVar("T")


def effort_of(session: Session, work: Callable[[], T]) -> tuple[T, Effort]:
    """Do a piece of work on a session, and note what it took.

    The memory is the growth of what `peak_memory` reads over what was held when the work began:
    the models that a comparison holds besides do not count. On a CPU it is that of the resident
    set, which sees neither what fits into pages that the process has already nor, where the C
    library cannot be asked to give back free pages, what fits into those of earlier cells.
    """
    device = session.model.device
    done: list[tuple[T, float]] = []
    held: list[int] = []
    known = session.known_trials

    def noted() -> None:
        held.append(_held(device))
        started = perf_counter()
        result = work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        done.append((result, perf_counter() - started))

    gc.collect()
    _give_back_free_pages()
    peak = peak_memory(device, noted)
    if not done:
        # Where no peak can be had, `peak_memory` leaves the work undone.
        noted()
    result, seconds = done[0]
    grown = None if peak is None else max(0, peak[1] - held[0])
    known = session.known_trials - known
    return result, Effort(seconds=seconds, memory=grown, known_trials=known)


def _held(device: torch.device) -> int:
    """Bytes that are held now, counted as `peak_memory` counts them."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if not STATUS.exists():
        return 0
    found = re.search(r"^VmRSS:\s+(\d+) kB$", STATUS.read_text(), flags=re.MULTILINE)
    return 1024 * int(found[1]) if found else 0


def _give_back_free_pages() -> None:
    """Pages that an earlier cell has freed would hide what the next one takes."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
