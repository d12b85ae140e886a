"""How well a time model fitted to eight shapes predicts the times of other shapes.

All shapes are models of the given one's class with random weights. They are timed in turns, and
medians over the rounds are compared: the model is fitted to the shapes that a planner measures
(`slm_plugin.pruners.hybrid.shapes.shapes_to_measure`), and predicts those and the others.

    python benchmarks/time_model.py --new 8 --repeats 15
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from slm_plugin.errors import SlmError
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.pruners.hybrid.shapes import Shape, shapes_to_measure
from slm_plugin.pruners.hybrid.time_model import fit
from slm_plugin.pruners.hybrid.timing import Times, measure
from slm_plugin.pruners.hybrid.workload import Workload
from slm_plugin.session import Session

Phase = Literal["prefill", "decode"]
# Shares of the layers, the MLP channels and the KV groups of shapes that are not fitted.
OTHERS = ((0.9, 1.0, 1.0), (0.8, 0.9, 1.0), (1.0, 0.75, 1.0), (0.75, 0.8, 0.67), (0.95, 0.7, 0.67))


def others(dense: Shape, kv_groups: bool) -> list[Shape]:
    """The shapes that are predicted alone; channels in multiples of 8."""
    return [
        Shape(
            round(layers * dense.layers),
            round(width * dense.mlp_width / 8) * 8,
            max(1, round((groups if kv_groups else 1) * dense.kv_groups)),
        )
        for layers, width, groups in OTHERS
    ]


def rows(
    phase: Phase, times: Mapping[Shape, Times], fitted: list[Shape], steps: int
) -> Iterator[list[str]]:
    """A row per shape: milliseconds as measured and as predicted, and how far they differ."""
    seconds = {shape: found.of(phase) for shape, found in times.items()}
    model = fit({shape: seconds[shape] for shape in fitted}).model
    for shape, measured in seconds.items():
        predicted = model.seconds(shape)
        yield [
            phase,
            str(shape.layers),
            f"{shape.mlp_width:,}",
            str(shape.kv_groups),
            f"{1000 * measured / steps:.1f}",
            f"{1000 * predicted / steps:.1f}",
            f"{predicted / measured - 1:+.1%}",
            "yes" if shape in fitted else "no",
        ]


def main() -> None:
    """Measure, fit and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=32, help="steps after the prompt")
    parser.add_argument("--batch", type=int, default=1, help="prompts side by side")
    parser.add_argument("--backend", choices=("pytorch", "onnxruntime"), default="pytorch")
    parser.add_argument("--repeats", type=int, default=5, help="how often each shape is timed")
    parser.add_argument("--kv-groups", action="store_true", help="vary the KV groups as well")
    parser.add_argument("--journal", type=Path, help="folder of rounds, to go on with later")
    asked = parser.parse_args()
    workload = Workload(
        prompt_tokens=asked.prompt,
        new_tokens=asked.new,
        batch_size=asked.batch,
        backend=asked.backend,
    )
    try:
        model, tokenizer = load(ModelSource(id=asked.model, dtype=asked.dtype))
        session = Session(model, tokenizer, journals=asked.journal)
        dense = session.view.dimensions()
        fitted = shapes_to_measure(dense, kv_groups=asked.kv_groups)
        shapes = [*fitted, *others(Shape.of(dense), asked.kv_groups)]
        times = measure(session, workload, shapes, repeats=asked.repeats)
    except SlmError as error:
        raise SystemExit(str(error)) from error
    head = ["phase", "layers", "MLP", "KV", "measured ms", "predicted ms", "residual", "fitted"]
    found = [*rows("prefill", times, fitted, 1), *rows("decode", times, fitted, asked.new)]
    for line in (head, ["---"] * len(head), *found):
        print("| " + " | ".join(line) + " |")


if __name__ == "__main__":
    main()
