"""Memory of a workload, against the bytes of weights and of a real cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError

from slm_plugin.evaluation.footprint import weight_bytes
from slm_plugin.evaluation.latency import decode
from slm_plugin.evaluation.prefill import prefill
from slm_plugin.models.view import DecoderView
from slm_plugin.pruners.hybrid.workload import Workload
from tests.tiny import SMOLLM2, make_model, random_tokens

# Classes without a sliding window: all their layers cache every position.
WHOLE = (
    "llama", "qwen2", "qwen3", "smollm3", "granite", "olmo2", "stablelm", "phi3", "gpt_neox",
    "opt", "gpt2", "mixtral", "qwen3_moe", "falcon_sequential", "llava",
)  # fmt: skip
WINDOWED = ("gemma2", "gemma3", "olmo3", "gpt_oss")


def cached(family: str, rows: int, prompt: int, new: int, **sizes: Any) -> tuple[int, int, int]:
    """Bytes of weights and cache behind a prefill and some steps, by formula and as they are."""
    model = make_model(family, **sizes)
    with torch.inference_mode():
        first = prefill(model, random_tokens(rows, prompt))
        cache: Any = first.past_key_values
        decode(model, first.logits[:, -1:].argmax(-1), cache, new)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    workload = Workload(prompt_tokens=prompt, new_tokens=new, batch_size=rows)
    weights = weight_bytes(model)
    return workload.memory(DecoderView.of(model).dimensions(), model.dtype), weights, held


@pytest.mark.parametrize("family", WHOLE)
def test_it_is_the_bytes_of_weights_and_cache(family: str) -> None:
    """Of every family, with grouped queries and without."""
    found, weights, held = cached(family, rows=2, prompt=12, new=4)
    assert held > 0
    assert found == weights + held


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_cache_is_that_of_the_key_value_heads(heads: int) -> None:
    """With one, two or all of four heads, in a tied model."""
    sizes = {"num_key_value_heads": heads, "tie_word_embeddings": True}
    found, weights, held = cached("llama", rows=3, prompt=5, new=2, **sizes)
    assert held == 2 * 6 * heads * 8 * 3 * 7 * 4
    assert found == weights + held


@pytest.mark.parametrize("family", WINDOWED)
def test_windows_are_counted_as_if_nothing_was_forgotten(family: str) -> None:
    """Exact within the window of 8, more than is held beyond it."""
    found, weights, held = cached(family, rows=1, prompt=4, new=2)
    assert found == weights + held
    found, weights, held = cached(family, rows=1, prompt=20, new=2)
    assert found > weights + held


def test_a_graph_is_float32() -> None:
    """Whatever the model is in PyTorch, where a number of it has two bytes."""
    half, graph = Workload(), Workload(backend="onnxruntime")
    assert half.memory(SMOLLM2, torch.bfloat16) * 2 == graph.memory(SMOLLM2, torch.bfloat16)
    assert half.memory(SMOLLM2, torch.bfloat16) == 2 * (134_515_008 + 2 * 30 * 3 * 64 * 160)


@pytest.mark.parametrize(
    "wrong", [{"prompt_tokens": 0}, {"new_tokens": 0}, {"batch_size": -1}, {"backend": "vllm"}]
)
def test_what_cannot_be_run_is_refused(wrong: dict[str, Any]) -> None:
    """Nothing to read, nothing to write, nobody to run it."""
    with pytest.raises(ValidationError):
        Workload(**wrong)
