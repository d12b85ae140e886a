"""Give damaged inputs to one kind, count what becomes of them, and keep what is a fault of ours."""

from __future__ import annotations

import random
import resource
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from slm_plugin.errors import SlmError
from slm_plugin.progress import console
from tests.fuzz.targets import Kind

# Seconds that one input may take, bytes that all of them may add to the process, and addresses that
# one may ask for: what asks for more fails with its seed, and takes no machine down.
LONGEST = 10
GROWTH = 1 << 30
ADDRESSES = 6 << 30


class Hang(BaseException):
    """An input took too long."""


@dataclass
class Count:
    """What became of the inputs of one kind.

    Attributes:
        failures: Of each internal error the seed, the input and the traceback.
    """

    kind: str
    tried: int = 0
    refused: int = 0
    worked: int = 0
    seconds: float = 0.0
    failures: list[tuple[int, bytes, str]] = field(default_factory=list)

    def row(self) -> str:
        """The counts as a line of a table."""
        numbers = (self.tried, self.refused, self.worked, len(self.failures))
        return f"| {self.kind} | " + " | ".join(f"{number:,}" for number in numbers) + " |"


HEADER = "| kind | tried | refused | worked | internal errors |\n|---|---|---|---|---|"


def fuzz(kind: Kind, seeds: range) -> Count:
    """Try one damaged input a seed; whatever is no `SlmError` is a failure."""
    count = Count(kind.name)
    started = time.perf_counter()
    console.quiet, before = True, console.quiet
    memory = _memory()
    try:
        with _less_memory():
            for seed in seeds:
                _one(kind, seed, count)
    finally:
        console.quiet = before
    count.seconds = time.perf_counter() - started
    grown = _memory() - memory
    if grown > GROWTH:
        count.failures.append((seeds.start, b"", f"memory grew by {grown >> 20} MB"))
    return count


def _one(kind: Kind, seed: int, count: Count) -> None:
    content = kind.make(random.Random(f"{kind.name} {seed}"))
    count.tried += 1
    try:
        with _bounded():
            taken = kind.use(content)
    except SlmError as error:
        count.refused += 1
        text = str(error)
        if not text.strip() or len(text) > 20_000:
            count.failures.append((seed, content, f"a message of {len(text)} characters"))
    except (Exception, Hang, SystemExit):
        count.failures.append((seed, content, traceback.format_exc()))
    else:
        count.worked += taken
        count.refused += not taken


@contextmanager
def _bounded() -> Iterator[None]:
    """Stop what hangs."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        raise Hang(f"more than {LONGEST} seconds")

    former = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


@contextmanager
def _less_memory() -> Iterator[None]:
    """Let the process grow so far and no further."""
    pages = Path("/proc/self/statm")
    former = resource.getrlimit(resource.RLIMIT_AS)
    if pages.exists():
        used = int(pages.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + ADDRESSES, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, former)


def _memory() -> int:
    """The peak of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
