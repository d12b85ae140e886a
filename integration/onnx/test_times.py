"""Times of pruned shapes in ONNX Runtime: the graphs compute what the timed models compute."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from slm_plugin.evaluation.latency import decode
from slm_plugin.evaluation.prefill import prefill
from slm_plugin.export.ort_heads import load_ort_model
from slm_plugin.pruners.hybrid import onnx_timing
from slm_plugin.pruners.hybrid.onnx_timing import decode_graph
from slm_plugin.pruners.hybrid.shapes import Shape
from slm_plugin.pruners.hybrid.stand_ins import stand_ins
from slm_plugin.pruners.hybrid.timing import measure
from slm_plugin.pruners.hybrid.workload import Workload
from slm_plugin.session import Session
from tests.tiny import make_model, random_tokens

pytest.importorskip("optimum.onnxruntime", exc_type=ImportError)
SHAPES = [Shape(3, 48, 2), Shape(2, 40, 1)]
WORKLOAD = Workload(prompt_tokens=6, new_tokens=3, batch_size=2, backend="onnxruntime")


def test_shapes_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both phases of each, of a half-precision model too; the second call exports nothing."""
    session = Session(make_model(num_hidden_layers=3).bfloat16(), journals=tmp_path)
    state = torch.get_rng_state()
    found = measure(session, WORKLOAD, SHAPES, repeats=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(times.prefill > 0 and times.decode > 0 for times in found.values())

    @contextmanager
    def none(*_: Any) -> Iterator[None]:
        pytest.fail("exported again")
        yield

    monkeypatch.setattr(onnx_timing, "graphs", none)
    assert measure(session, WORKLOAD, SHAPES, repeats=2) == found


def test_the_graph_writes_what_pytorch_writes() -> None:
    """Greedy tokens with the cache, by the graph of a narrower model with the same weights."""
    session, prompt = Session(make_model(num_hidden_layers=3)), random_tokens(2, 6)
    with onnx_timing.graphs(session, SHAPES) as made:
        graph = load_ort_model(made[1].folder)
        mask = torch.ones((2, 10), dtype=torch.long)
        first = graph(input_ids=prompt, attention_mask=mask[:, :6], use_cache=True)
        written = decode_graph(graph, first, mask, 4)
    (model,) = stand_ins(session.view, SHAPES[1:], torch.float32, torch.device("cpu"))
    with torch.inference_mode():
        start: Any = prefill(model, prompt)
        cache = start.past_key_values
        expected = decode(model, start.logits[:, -1:].argmax(-1), cache, 4)
    assert torch.equal(written, expected)
