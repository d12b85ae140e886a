"""What cannot be loaded says so in one line; what can be, computes what was saved."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.loading import ModelSource, load, pick_device
from tests.tiny import make_model, random_tokens


def saved(model: PreTrainedModel, folder: Path) -> Path:
    """A checkpoint folder."""
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_folder_loads_as_it_was_saved(family: str, tmp_path: Path) -> None:
    """Logits are those of the saved model, bit for bit, and a lacking tokenizer is None."""
    model = make_model(family)
    loaded, tokenizer = load(ModelSource(id=str(saved(model, tmp_path / "m")), device="cpu"))
    tokens = random_tokens(2, 8)
    with torch.inference_mode():
        assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert tokenizer is None
    assert not loaded.training


def test_the_number_format_is_the_one_asked_for(tmp_path: Path) -> None:
    """`dtype` converts; auto keeps what the checkpoint has."""
    folder = str(saved(make_model().to(torch.bfloat16), tmp_path / "m"))
    assert load(ModelSource(id=folder, device="cpu"))[0].dtype == torch.bfloat16
    assert load(ModelSource(id=folder, device="cpu", dtype="float32"))[0].dtype == torch.float32


@pytest.mark.parametrize("style", ["rope_theta", "rope_parameters"])
def test_either_spelling_of_the_rope_base_is_read(style: str, tmp_path: Path) -> None:
    """Transformers 4 writes rope_theta and 5 rope_parameters; both majors obey both."""
    model = make_model()
    folder = saved(model, tmp_path / "m")
    written = json.loads((folder / "config.json").read_text())
    for name in ("rope_theta", "rope_parameters", "rope_scaling"):
        written.pop(name, None)
    written[style] = (
        7777.0 if style == "rope_theta" else {"rope_type": "default", "rope_theta": 7777.0}
    )
    (folder / "config.json").write_text(json.dumps(written))
    loaded, _ = load(ModelSource(id=str(folder), device="cpu"))
    second = float(loaded.model.rotary_emb.inv_freq[1])
    assert second == pytest.approx(7777.0 ** (-2 / 8), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("./nowhere", "there is no folder"),
        ("/no/such/place", "there is no folder"),
        ("nowhere.gguf", "there is no file"),
        ("somebody/some-model", "cannot fetch"),
    ],
)
def test_a_missing_model_is_one_line_with_a_remedy(name: str, message: str) -> None:
    """Offline, a Hub id says what to do instead."""
    with pytest.raises(ModelSourceError) as caught:
        load(ModelSource(id=name))
    assert message in str(caught.value)
    assert "\n" not in caught.value.args[0]


def test_a_folder_without_weights_names_itself(tmp_path: Path) -> None:
    """An empty folder is not a checkpoint."""
    (tmp_path / "m").mkdir()
    with pytest.raises(ModelSourceError, match="cannot load the checkpoint"):
        load(ModelSource(id=str(tmp_path / "m")))


def test_a_truncated_weight_file_is_refused(tmp_path: Path) -> None:
    """Half a download is an error, not half a model."""
    folder = saved(make_model(), tmp_path / "m")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelSourceError, match="shorter than its header says"):
        load(ModelSource(id=str(folder)))


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
def test_a_device_that_is_not_there_is_refused() -> None:
    """Asked for by name, a lacking device is an error; auto never is."""
    with pytest.raises(ModelSourceError, match="no device 'cuda'"):
        pick_device("cuda")
    assert pick_device("auto").type in ("cpu", "mps")
