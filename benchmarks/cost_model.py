"""What planning and exporting layer by layer costs for models of 7B, 70B and 405B: computed.

Nothing is measured here. The search is the package's own walk over a made-up similarity (every
layer costs a seeded random amount, costs add up); what a trial reads and computes is counted, and
divided by round figures of a class of devices:

    layers a trial runs  = the merged layer + the layers above its window, committed windows as one
    bytes read           = weights x (check + fingerprint + layers of the capture)
                           + layer x (layers that all trials run)
                           + pruned weights x (fingerprint, logits, writing, and two in the reload)
    operations           = 2 x parameters x tokens, for every layer forward
    minutes              = bytes read / reading speed + operations / computing speed

    python benchmarks/cost_model.py
"""

from __future__ import annotations

import argparse
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from slm_plugin.pruners.depth.search.runs import Measured, Run, Runs
from slm_plugin.pruners.depth.search.sliding import WalkRules, walk, walk_to_size

GB = 10**9
TERA = 10**12
WIDTH = 2  # bytes of a bfloat16
AFTERWARDS = 5


@dataclass(frozen=True)
class Shape:
    """A Llama, untied."""

    name: str
    layers: int
    hidden: int
    intermediate: int
    kv: int
    vocabulary: int

    @property
    def layer(self) -> int:
        """Parameters of one layer; ``kv`` is the width of its keys."""
        attention = 2 * self.hidden**2 + 2 * self.hidden * self.kv
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and of the head."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.layers * self.layer + 2 * self.embedding + self.hidden


@dataclass(frozen=True)
class Device:
    """Round figures of a class of devices: reading in GB/s, computing in 10^12 operations/s."""

    name: str
    reading: float
    computing: float


@dataclass(frozen=True)
class Cost:
    """What one run takes."""

    trials: int
    layer_forwards: int
    bytes_read: int
    operations: int

    def minutes(self, device: Device) -> float:
        """Reading and computing one after the other."""
        seconds = self.bytes_read / (device.reading * GB)
        return (seconds + self.operations / (device.computing * TERA)) / 60


SHAPES = (
    Shape("7B", 32, 4096, 11008, 4096, 32000),
    Shape("70B", 80, 8192, 28672, 1024, 128256),
    Shape("405B", 126, 16384, 53248, 1024, 128256),
)
DEVICES = (
    Device("CPU, SATA SSD", 0.5, 0.2),
    Device("CPU, NVMe", 3, 0.5),
    Device("24 GB GPU, NVMe", 5, 50),
    Device("80 GB GPU, weights cached in RAM", 20, 300),
)


def trial_layers(layers: int, last: int, rest: Runs) -> int:
    """Layers that a trial runs."""
    above = layers - 1 - last
    return 1 + above - sum(run.removed for run in rest)


def search(layers: int, removed: int | None) -> tuple[int, int, int]:
    """Trials, layers that they run, and layers removed; None for a walk where nothing merges."""
    rules = WalkRules(layers, 0, 1)
    generator = random.Random(1234)
    price = [generator.uniform(0.2, 1) / layers for _ in range(layers)]
    made: dict[tuple[int, int, Runs], int] = {}

    def measure(
        first: int, last: int, rest: Runs, *, base: Runs = (), bound: float | None = None
    ) -> Measured:
        made[first, last, rest] = trial_layers(layers, last, rest)
        run = Run(first, last, "telescoped")
        return Measured(run, 1 - sum(sum(price[r.first : r.last]) for r in (run, *rest)))

    if removed is None:
        walk(rules, 1.1, measure)
    else:
        walk_to_size(rules, removed, measure, 1.0)
    return len(made), sum(made.values()), removed or 0


def cost(shape: Shape, removed: int | None, tokens: int) -> Cost:
    """Cost of planning, and of applying and writing when layers are removed."""
    trials, run, gone = search(shape.layers, removed)
    after = AFTERWARDS if removed else 0
    kept = shape.layers - gone
    read = 2 * shape.parameters + (shape.layers + run) * shape.layer
    read += after * (shape.parameters - gone * shape.layer)
    forwards = shape.layers + run
    # The verification runs some 150 tokens, twice.
    operations = 2 * shape.layer * (forwards * tokens + (2 * kept * 150 if removed else 0))
    return Cost(trials, forwards, WIDTH * read, operations)


def rows(tokens: int) -> Iterator[list[str]]:
    """The table."""
    yield ["model", "what", "trials", "layer forwards", "TB read", *(d.name for d in DEVICES)]
    for shape in SHAPES:
        quarter = round(shape.layers / 4)
        for what, removed in (
            ("plan only, nothing merges", None),
            (f"{quarter} of {shape.layers} layers, checkpoint", quarter),
        ):
            found = cost(shape, removed, tokens)
            yield [
                shape.name,
                what,
                str(found.trials),
                str(found.layer_forwards),
                f"{found.bytes_read / 1000 / GB:.2f}",
                *(_minutes(found.minutes(device)) for device in DEVICES),
            ]


def _minutes(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def memory(tokens: int) -> Iterator[list[str]]:
    """Memory and scratch disk."""
    yield ["model", "weights", "embedding", "one layer", "head", "hidden states", "scratch disk"]
    for shape in SHAPES:
        state = tokens * shape.hidden * WIDTH
        sizes = (shape.parameters, shape.embedding, shape.layer, shape.embedding)
        yield [
            shape.name,
            *(f"{WIDTH * size / GB:,.2f} GB" for size in sizes),
            f"{2 * state / GB:.2f} GB",
            f"{shape.layers * state / GB:.2f} GB",
        ]


def table(lines: Iterator[list[str]]) -> str:
    """Rows as Markdown, the first one the header."""
    head, *body = lines
    rule = ["---"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in (head, rule, *body))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1280, help="tokens of the calibration set")
    tokens = parser.parse_args().tokens
    print(f"Computed, not measured: bfloat16, {tokens} calibration tokens; minutes by device.\n")
    print(table(rows(tokens)), table(memory(tokens)), sep="\n\n")


if __name__ == "__main__":
    main()
