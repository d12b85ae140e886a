"""From the Hub: the config decides before a weight is asked for, and nothing else is fetched."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

import pytest

from slm_plugin.errors import ModelSourceError, SlmError
from slm_plugin.models.fingerprint import fingerprint
from slm_plugin.models.loading import ModelSource, load
from tests.tiny import make_model

Memory = Literal["whole", "layerwise"]


class Hub:
    """One repository, and what was asked of it."""

    def __init__(self, folder: Path) -> None:
        self.repository, self.snapshot = folder / "there", folder / "snapshots" / "c0ffee"
        self.repository.mkdir()
        self.snapshot.mkdir(parents=True)
        self.fetched: list[str] = []
        self.revisions: list[object] = []

    def file(self, name: str, filename: str, *, revision: str | None) -> str:
        """Stand for `hf_hub_download`."""
        self.revisions.append(revision)
        return str(self._fetch(filename))

    def files(
        self, name: str, *, revision: str, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        """Stand for `snapshot_download`."""
        self.revisions.append(revision)
        for file in self.repository.rglob("*"):
            path = str(file.relative_to(self.repository))
            wanted = any(fnmatch(path, pattern) for pattern in allow_patterns)
            if file.is_file() and wanted and not any(fnmatch(path, p) for p in ignore_patterns):
                self._fetch(path)
        return str(self.snapshot)

    def _fetch(self, path: str) -> Path:
        if not (self.repository / path).is_file():
            raise OSError(f"404: no {path}\nand a long explanation")
        if path not in self.fetched:
            self.fetched.append(path)
            shutil.copy(self.repository / path, self.snapshot / path)
        return self.snapshot / path


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A Hub with a sharded checkpoint and much beside it."""
    made = Hub(tmp_path)
    make_model().save_pretrained(made.repository, max_shard_size="30KB")
    (made.repository / "pytorch_model.bin").write_bytes(b"pickle")
    (made.repository / "consolidated.safetensors").write_bytes(b"other names")
    (made.repository / "modeling_x.py").write_text("raise SystemExit", encoding="utf-8")
    (made.repository / "original").mkdir()
    (made.repository / "original" / "params.json").write_text("{}", encoding="utf-8")
    monkeypatch.setattr("huggingface_hub.hf_hub_download", made.file)
    monkeypatch.setattr("huggingface_hub.snapshot_download", made.files)
    return made


@pytest.mark.parametrize("memory", ["whole", "layerwise"])
def test_only_what_is_read_is_fetched_at_one_commit(hub: Hub, memory: Memory) -> None:
    """Shards by the index, at the commit that the branch was when the config was read."""
    source = ModelSource(id="someone/model", revision="v2", memory=memory, device="cpu")
    model, _ = load(source)
    assert fingerprint(model) == fingerprint(make_model())
    assert hub.revisions == ["v2", "c0ffee", "c0ffee"]
    assert hub.fetched[0] == "config.json"
    kinds = {Path(name).suffix for name in hub.fetched}
    assert kinds == {".json", ".safetensors"}
    assert not {"original/params.json", "consolidated.safetensors"} & set(hub.fetched)
    assert model.config._name_or_path == "someone/model"


@pytest.mark.parametrize(
    "fields",
    [
        {"architectures": ["BloomForCausalLM"], "model_type": "bloom"},
        {"quantization_config": {"quant_method": "awq"}},
        {"hidden_size": 0},
    ],
)
def test_a_refused_config_costs_one_small_file(hub: Hub, fields: dict[str, Any]) -> None:
    """Neither weights nor a tokenizer are fetched for a model that cannot be used."""
    file = hub.repository / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields), encoding="utf-8")
    with pytest.raises(SlmError):
        load(ModelSource(id="someone/model", device="cpu"))
    assert hub.fetched == ["config.json"]


def test_an_adapter_is_refused_before_weights_are_fetched(hub: Hub) -> None:
    """With the hint to merge it."""
    (hub.repository / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelSourceError, match="holds an adapter"):
        load(ModelSource(id="someone/model", device="cpu"))
    assert not [name for name in hub.fetched if name.endswith(".safetensors")]


def test_a_repository_without_a_config_is_one_line(hub: Hub) -> None:
    """The first line of the Hub's reason, and what to check."""
    (hub.repository / "config.json").unlink()
    with pytest.raises(ModelSourceError, match="cannot fetch 'someone/model'") as caught:
        load(ModelSource(id="someone/model", device="cpu"))
    assert caught.value.message.endswith("404: no config.json")
