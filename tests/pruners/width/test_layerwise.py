"""Width stages on a model whose layers are read one at a time, against the same in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, get_args

import pytest
import torch

pytest.importorskip("torch_pruning")

from slm_plugin.errors import RecipeError
from slm_plugin.export.checkpoint import CheckpointExporter
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.models.streaming import is_streamed
from slm_plugin.pruners.width.width import Width
from slm_plugin.pruners.width.width_options import ScoreName, WidthOptions
from slm_plugin.recipe import Recipe
from slm_plugin.session import Session
from slm_plugin.target import Target
from tests.tiny import make_model, make_tokenizer, random_tokens

TOKENS = random_tokens(10, 12)
WHOLE = ("taylor", "taylor_sum", "taylor_second", "taylor_mixed", "policy_gradient")
STREAMED = [name for name in get_args(ScoreName) if name not in WHOLE]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint whose projections have biases, and whose head is its own."""
    made = tmp_path_factory.mktemp("model")
    model = make_model(num_hidden_layers=3, attention_bias=True, mlp_bias=True)
    model.save_pretrained(made)
    make_tokenizer().save_pretrained(made)
    return made


def session(folder: Path, memory: str) -> Session:
    """The model, whole or streamed."""
    model, tokenizer = load(ModelSource.model_validate({"id": str(folder), "memory": memory}))
    assert is_streamed(model) == (memory == "layerwise")
    return Session(model, tokenizer, calibration=TOKENS, batch_tokens=48)


def pruner(score: str, heads: str = "kv_groups") -> Width:
    """A strategy that removes channels and a KV group, or a query head of each."""
    options = {"score": score, "restore": "none", heads: 1, "multiple_of": 4}
    return Width(WidthOptions.model_validate(options), Target(ratio=0.25))


@pytest.mark.parametrize(
    ("score", "heads"), [*((one, "kv_groups") for one in STREAMED), ("obs", "query_heads")]
)
def test_a_streamed_plan_is_that_of_the_model_in_memory(
    folder: Path, score: str, heads: str
) -> None:
    """The same bytes; and no layer stays in memory behind."""
    streamed = session(folder, "layerwise")
    found = streamed.plan(pruner(score, heads))
    assert found.to_json() == session(folder, "whole").plan(pruner(score, heads)).to_json()
    assert all(is_streamed(layer) for layer in streamed.view.layers)


@pytest.mark.parametrize("heads", ["kv_groups", "query_heads"])
def test_a_streamed_plan_is_applied_without_reading_the_model(
    folder: Path, tmp_path: Path, heads: str, reload_here: None
) -> None:
    """Slices of stored tensors: the same logits, the same dimensions, the same file."""
    written = []
    for memory in ("whole", "layerwise"):
        one = session(folder, memory)
        plan = one.plan(pruner("wanda_sp", heads))
        one.apply(plan)
        assert one.view.dimensions() == plan.after
        assert is_streamed(one.model) == (memory == "layerwise")
        with torch.no_grad():
            logits = one.model(TOKENS, use_cache=False).logits
        output = tmp_path / memory
        output.mkdir()
        one.export(CheckpointExporter(CheckpointExporter.Options()), output)
        written.append((logits, (output / "checkpoint" / "model.safetensors").read_bytes()))
    (whole, file), (streamed, other) = written
    assert torch.equal(whole, streamed) and file == other


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"restore": "none"}, "`score: taylor` needs gradients (name another score)"),
        (
            {"score": "policy_gradient", "restore": "none"},
            "`score: policy_gradient` runs all layers at every step (name another score)",
        ),
        ({"score": "flap"}, "it restores weights (set `restore: none`)"),
        ({"score": "flap", "restore": "none"}, ""),
    ],
)
def test_what_needs_the_whole_model_is_refused_when_read(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    """With the reason and the way out, once."""
    data = {
        "model": {"id": str(folder), "memory": "layerwise"},
        "calibration": {"source": "builtin"},
        "stages": [{"prune": "width", "target": {"ratio": 0.2}, **options}],
    }
    if not message:
        assert len(Recipe.from_dict(data).stages) == 1
        return
    with pytest.raises(RecipeError) as caught:
        Recipe.from_dict(data)
    assert str(caught.value).endswith(
        f"stages.0: 'width' needs the whole model, because {message}, and model.memory is layerwise"
    )
    assert len(str(caught.value).splitlines()) == 1
