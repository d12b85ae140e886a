"""What a basis for every layer is worth, beside the one basis of `hidden_score: pca`.

SliceGPT (arXiv 2401.15024) rotates the stream into other principal components before every block.
Here every layer has a basis for its two blocks, computed on the model as sliced below. No weight
changes: the stream is projected on the kept components where a sliced model would have no others,
at the input of every layer, behind its attention and before the last norm. That computes the same
(`tests/benchmarks/test_stream_rotations.py`).

    python benchmarks/stream_rotations.py --data data --kept 504 432
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from slm_plugin import Session
from slm_plugin.calibration.captures import Batch, in_float64, projection_inputs, run_layers
from slm_plugin.calibration.components import moments_read, principal_components
from slm_plugin.calibration.samples import CalibrationSource, draw
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.models.view import DecoderView
from slm_plugin.registry import evaluators

Moments = Callable[[Tensor], Tensor]


def of_stream(states: Tensor) -> Tensor:
    """Second moments of the stream, as SliceGPT takes them, ``(hidden, hidden)``."""
    tokens = in_float64(states.flatten(0, 1))
    return tokens.T @ tokens


def leading(moments: Tensor, kept: int) -> Tensor:
    """The projection on the leading eigenvectors, ``(hidden, hidden)``."""
    vectors = torch.linalg.eigh(moments).eigenvectors[:, -kept:]
    return vectors @ vectors.T


@torch.no_grad()
def per_layer(view: DecoderView, batches: list[Batch], kept: int, moments: Moments) -> list[Tensor]:
    """The projections of all layers and of the head, each on the model as sliced below it."""
    states = [batch.inputs[0] for batch in batches]
    found = []
    for index, layer in enumerate(view.layers):
        arguments = [batch.arguments[index] for batch in batches]
        norm = layer.get_submodule(view.family.mlp[1])
        runs = zip(states, arguments, strict=True)
        total = sum(map(moments, states), torch.zeros(()))
        for seen, _ in projection_inputs(layer, norm, runs):
            total = total + moments(seen)
        found.append(leading(total, kept))
        with projected(view, {index: found[-1]}):
            states = [
                run_layers([layer], state, said)
                for state, said in zip(states, arguments, strict=True)
            ]
    return [*found, leading(sum(map(moments, states), torch.zeros(())), kept)]


@contextmanager
def projected(view: DecoderView, projections: dict[int, Tensor]) -> Iterator[None]:
    """Project the stream at layers, and before the last norm with the number of layers."""
    with ExitStack() as hooks:
        for index, matrix in projections.items():
            top = index == len(view.layers)
            module = view.norm if top else view.layers[index]

            def enter(_: Any, given: Any, matrix: Tensor = matrix) -> Any:
                return (given[0] @ matrix.to(given[0]), *given[1:])

            def write(_: Any, given: Any, output: Tensor, matrix: Tensor = matrix) -> Tensor:
                return output @ matrix.to(output)

            hooks.callback(module.register_forward_pre_hook(enter).remove)
            if not top:
                written = view.projections(module)["o_proj"]
                hooks.callback(written.register_forward_hook(write).remove)
        yield


def main() -> None:
    """Print the perplexities of every way to rotate, for every number of components."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--kept", type=int, nargs="+", default=[504, 432])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    asked = parser.parse_args()
    model, tokenizer, *_ = load(ModelSource(id=asked.model, dtype="float32"))
    calibration = CalibrationSource(
        source=str(asked.data / "c4_en_train_1k.jsonl"), samples=asked.samples, length=asked.length
    )
    session = Session(model, tokenizer, draw(calibration, model, tokenizer, 1234))
    view, batches = session.view, session.captured()
    kind = evaluators.get("perplexity")
    texts = [
        kind(kind.Options(source=str(asked.data / name), length=length, limit=limit))
        for name, length, limit in (
            ("wikitext2_raw_test.txt", 2048, 4),
            ("c4_en_dev_300.jsonl", 512, 32),
        )
    ]
    sys.stdout.write("| kept | bases | WikiText-2, 2048 | C4 |\n|---|---|---|---|\n")
    everywhere = range(len(view.layers) + 1)
    _, shared = principal_components(view, batches)
    for kept in asked.kept:
        one = shared[:, :kept] @ shared[:, :kept].T
        ways = {
            "one": [one for _ in everywhere],
            "every layer, of what is read": per_layer(view, batches, kept, moments_read),
            "every layer, of the stream": per_layer(view, batches, kept, of_stream),
        }
        for name, matrices in ways.items():
            with projected(view, dict(enumerate(matrices))):
                values = [text.measure(session)[0].value for text in texts]
            sys.stdout.write(f"| {kept} | {name} | {values[0]:.1f} | {values[1]:.1f} |\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
