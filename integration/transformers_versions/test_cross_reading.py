"""What this environment saves, another one computes from.

Set ``SLM_PLUGIN_OTHER_PYTHON`` to the interpreter of an environment with another major release of
transformers, in which slm_plugin is installed. Run it from both sides.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import PreTrainedModel

from slm_plugin.export.checkpoint import save_checkpoint, verify_checkpoint
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.registry import pruners
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.tiny import make_model, make_tokenizer, random_tokens

OTHER = os.environ.get("SLM_PLUGIN_OTHER_PYTHON", "")
pytestmark = pytest.mark.skipif(not OTHER, reason="SLM_PLUGIN_OTHER_PYTHON is not set")

FIVE = int(transformers.__version__.split(".")[0]) >= 5
SCALED = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "factor": 2.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}
SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 6,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "llama": ("llama", {}, None),
    "llama with scaled positions": ("llama", {"max_position_embeddings": 512}, SCALED),
    "llama with yarn": ("llama", {}, YARN),
    "llama with linear scaling": ("llama", {"tie_word_embeddings": True}, LINEAR),
    "llama with dynamic scaling": ("llama", {}, DYNAMIC),
    "mistral": ("mistral", {"sliding_window": 6}, None),
    "qwen2": ("qwen2", SLIDING, None),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}, None),
}


def rope(scaling: dict[str, Any] | None) -> dict[str, Any]:
    """A rotary embedding far from the default base, in the words of this transformers."""
    if FIVE:
        return {"rope_parameters": {"rope_theta": 500.0, **(scaling or {"rope_type": "default"})}}
    return {"rope_theta": 500.0, "rope_scaling": scaling}


def tiny_model(case: str) -> PreTrainedModel:
    """The model of a case."""
    family, settings, scaling = CASES[case]
    return make_model(
        family, **{"hidden_size": 48, "num_hidden_layers": 3, **settings, **rope(scaling)}
    )


@pytest.mark.parametrize("case", sorted(CASES))
def test_the_other_release_computes_the_same(tmp_path: Path, case: str) -> None:
    """Rotary base, scaling, windows, tied weights and tokenizer mean the same on both sides."""
    family, model = CASES[case][0], tiny_model(case)
    # transformers 5 replaces any tokenizer of a qwen2 model by its own class.
    tokenizer = None if family == "qwen2" else make_tokenizer()
    if tokenizer is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": ["w9"]})
    session = Session(model, tokenizer)
    save_checkpoint(session, tmp_path)
    checks = verify_checkpoint(session, tmp_path, python=OTHER)
    assert checks[0].value <= 1e-5


READ = """
import sys, torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from tests.tiny import random_tokens
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.inference_mode():
    save_file({"logits": model(random_tokens(2, 20)).logits}, sys.argv[2])
"""


def assert_read_by_the_other(session: Session, tmp_path: Path) -> None:
    """The stock class of the other release computes the same, in a process of its own."""
    folder, file = tmp_path / "m", tmp_path / "logits.safetensors"
    folder.mkdir()
    save_checkpoint(session, folder)
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [OTHER, "-c", READ, str(folder), str(file)]
    subprocess.run(command, check=True, cwd=root, env=environment, capture_output=True)
    with torch.inference_mode():
        wanted = session.model(random_tokens(2, 20)).logits
    assert float((load_file(file)["logits"] - wanted).abs().max()) <= 1e-5


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
def test_the_other_release_reads_a_mixture_without_some_experts(
    tmp_path: Path, family: str
) -> None:
    """The releases call the number of experts by other names, and lay them out otherwise."""
    session = Session(make_model(family, num_hidden_layers=3), calibration=random_tokens(4, 16))
    pruner = pruners.get("experts")
    session.apply(session.plan(pruner(pruner.Options(), Target(ratio=0.2))))
    assert_read_by_the_other(session, tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen3", "phi3", "gemma3"])
def test_the_other_release_reads_fewer_query_heads(tmp_path: Path, family: str) -> None:
    """Their number divides the hidden size, which transformers 5 demands of some families."""
    session = Session(make_model(family, num_hidden_layers=3))
    pruner = pruners.get("width")
    options = {"score": "magnitude", "restore": "none", "query_heads": 1, "multiple_of": 4}
    made = pruner(pruner.Options(**options), Target(ratio=0.2))
    session.apply(session.plan(made))
    assert_read_by_the_other(session, tmp_path)


WRITE = """
import sys, torch, transformers
from safetensors.torch import save_file
from integration.transformers_versions.test_cross_reading import CASES, tiny_model
from tests.tiny import make_tokenizer, random_tokens
model = tiny_model(sys.argv[1])
model.generation_config.temperature = 0.5
model.generation_config.do_sample = True
model.save_pretrained(sys.argv[2])
if not sys.argv[1].startswith("qwen2"):
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["w9"]})
    tokenizer.save_pretrained(sys.argv[2])
with torch.inference_mode():
    save_file({"logits": model(random_tokens(2, 20)).logits}, sys.argv[3])
"""


@pytest.mark.parametrize("memory", ["whole", "layerwise"])
@pytest.mark.parametrize("case", sorted(CASES))
def test_what_the_other_release_wrote_is_read(
    tmp_path: Path, case: str, memory: Literal["whole", "layerwise"]
) -> None:
    """A folder of stock ``save_pretrained``, without this package's mending."""
    folder, file = tmp_path / "m", tmp_path / "logits.safetensors"
    root = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [OTHER, "-c", WRITE, case, str(folder), str(file)]
    subprocess.run(command, check=True, cwd=root, env=environment, capture_output=True)
    model, tokenizer = load(ModelSource(id=str(folder), device="cpu", memory=memory))
    with torch.inference_mode():
        found = model(random_tokens(2, 20)).logits
    assert float((found - load_file(file)["logits"]).abs().max()) <= 1e-5
    assert model.generation_config.temperature == 0.5
    if tokenizer is not None:
        assert tokenizer("w3 w9")["input_ids"] == [3, 9] and "w9" in tokenizer.all_special_tokens
