"""What this environment saves, another one computes from.

Set ``SLM_PLUGIN_OTHER_PYTHON`` to the interpreter of an environment with another major release of
transformers, in which slm_plugin is installed. Run it from both sides.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import transformers

from slm_plugin.export.checkpoint import save_checkpoint, verify_checkpoint
from slm_plugin.session import Session
from tests.conftest import make_model, make_tokenizer

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
SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 6,
    "max_window_layers": 1,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any] | None]] = {
    "llama": ("llama", {}, None),
    "llama with scaled positions": ("llama", {"max_position_embeddings": 512}, SCALED),
    "mistral": ("mistral", {"sliding_window": 6}, None),
    "qwen2": ("qwen2", SLIDING, None),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}, None),
}


def rope(scaling: dict[str, Any] | None) -> dict[str, Any]:
    """A rotary embedding far from the default base, in the words of this transformers."""
    if FIVE:
        return {"rope_parameters": {"rope_theta": 500.0, **(scaling or {"rope_type": "default"})}}
    return {"rope_theta": 500.0, "rope_scaling": scaling}


@pytest.mark.parametrize("case", sorted(CASES))
def test_the_other_release_computes_the_same(tmp_path: Path, case: str) -> None:
    """Rotary base, scaling, windows, tied weights and tokenizer mean the same on both sides."""
    family, settings, scaling = CASES[case]
    model = make_model(
        family, **{"hidden_size": 48, "num_hidden_layers": 3, **settings, **rope(scaling)}
    )
    # transformers 5 replaces any tokenizer of a qwen2 model by its own class.
    tokenizer = None if family == "qwen2" else make_tokenizer()
    if tokenizer is not None:
        tokenizer.add_special_tokens({"additional_special_tokens": ["w9"]})
    session = Session(model, tokenizer)
    save_checkpoint(session, tmp_path)
    checks = verify_checkpoint(session, tmp_path, python=OTHER)
    assert checks[0].value <= 1e-5
