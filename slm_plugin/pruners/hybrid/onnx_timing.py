"""Time pruned shapes in ONNX Runtime: their graphs, and prefill and decoding by them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slm_plugin.evaluation.latency import timed
from slm_plugin.export.onnx import OnnxExporter, OnnxOptions, quiet_optimum, trace
from slm_plugin.export.ort_heads import load_ort_model
from slm_plugin.lazy import torch
from slm_plugin.outputs.scratch import temporary_folder
from slm_plugin.pruners.hybrid.shapes import Shape
from slm_plugin.pruners.hybrid.stand_ins import stand_ins

if TYPE_CHECKING:
    from torch import Tensor

    from slm_plugin.session import Session


@dataclass(frozen=True, slots=True)
class Graph:
    """The graph of one shape on disk."""

    folder: Path

    def time_run(self, prompt: Tensor, steps: int) -> tuple[float, float]:
        """Seconds of one prefill and of the greedy steps that follow it.

        The graph is read for the run and released behind it, and a run before it does not count,
        because reading is lazy. What is timed is what ``ORTModelForCausalLM`` computes: logits of
        all positions of the prompt, where PyTorch's prefill has those of the last one.

        Args:
            prompt: Token ids, ``(batch, tokens)``.
            steps: Greedy steps.
        """
        with quiet_optimum():
            model = load_ort_model(self.folder)
            _time_run(model, prompt, 1)
            return _time_run(model, prompt, steps)


@contextmanager
def graphs(session: Session, shapes: Sequence[Shape]) -> Iterator[list[Graph]]:
    """Export each shape into a temporary folder, which holds all of them as float32.

    Raises:
        MissingExtraError: Optimum or ONNX Runtime is missing, or does not fit transformers.
        UnsupportedModelError: Optimum does not export the family.
        SlmError: Optimum cannot export the model.
        OutputError: The folder cannot be written.
    """
    options = OnnxOptions()
    OnnxExporter(options).check_model(session)
    with temporary_folder() as scratch:
        made = []
        for shape in shapes:
            # One at a time: the model is released before the next is made.
            (model,) = stand_ins(session.view, [shape], torch.float32, torch.device("cpu"))
            folder = scratch / f"{shape.layers}-{shape.mlp_width}-{shape.kv_groups}"
            trace(model, folder, options)
            made.append(Graph(folder))
            del model
        yield made


def _time_run(model: Any, prompt: Tensor, steps: int) -> tuple[float, float]:
    mask = torch.ones((len(prompt), prompt.shape[1] + steps), dtype=torch.long)
    reading, first = timed(
        prompt.device,
        lambda: model(input_ids=prompt, attention_mask=mask[:, : prompt.shape[1]], use_cache=True),
    )
    writing, _ = timed(prompt.device, lambda: decode_graph(model, first, mask, steps))
    return reading, writing


def decode_graph(model: Any, output: Any, mask: Tensor, steps: int) -> Tensor:
    """Decode greedily behind a prefill; returns the new tokens, ``(batch, steps)``.

    Args:
        model: The graph as ``ORTModelForCausalLM``.
        output: What it gave for the prompt.
        mask: Ones for every position of prompt and new tokens, ``(batch, tokens)``.
        steps: New tokens.
    """
    before, found = mask.shape[1] - steps, []
    token = output.logits[:, -1:].argmax(-1)
    for step in range(steps):
        output = model(
            input_ids=token,
            attention_mask=mask[:, : before + step + 1],
            past_key_values=output.past_key_values,
            use_cache=True,
        )
        token = output.logits[:, -1:].argmax(-1)
        found.append(token)
    return torch.cat(found, dim=1)
