"""Which files are the checkpoint: one rule for both ways of reading, inside of one folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file, save_file

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.fingerprint import fingerprint
from slm_plugin.models.loading import ModelSource, load
from slm_plugin.models.weight_files import INDEX, SINGLE
from tests.tiny import make_model

Memory = Literal["whole", "layerwise"]
MEMORIES = pytest.mark.parametrize("memory", ["whole", "layerwise"])


def single(folder: Path) -> Path:
    """A checkpoint in one file."""
    make_model().save_pretrained(folder)
    return folder


def sharded(folder: Path) -> Path:
    """A checkpoint in several files."""
    make_model().save_pretrained(folder, max_shard_size="30KB")
    return folder


def places(folder: Path) -> dict[str, str]:
    """The index's map from tensors to files."""
    found: dict[str, str] = json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"]
    return found


def place(folder: Path, found: object) -> None:
    """Write an index."""
    (folder / INDEX).write_text(json.dumps({"weight_map": found}), encoding="utf-8")


def _both(folder: Path) -> None:
    single(folder.parent / "other")
    shutil.copy(folder.parent / "other" / SINGLE, folder)


def _stray_shard(folder: Path) -> None:
    save_file({"a": torch.ones(1)}, folder / "model-00099-of-00099.safetensors")


def _no_index(folder: Path) -> None:
    (folder / INDEX).unlink()


def _shard_gone(folder: Path) -> None:
    (folder / min(places(folder).values())).unlink()


def _unlisted_tensor(folder: Path) -> None:
    found = places(folder)
    found.pop("model.norm.weight")
    place(folder, found)


def _wrong_place(folder: Path) -> None:
    found = places(folder)
    names = sorted(set(found.values()))
    found["model.norm.weight"] = next(n for n in names if n != found["model.norm.weight"])
    place(folder, found)


def _elsewhere(target: str) -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        shard = min(places(folder).values())
        shutil.copy(folder / shard, folder.parent / "secret.safetensors")
        found = {n: target if f == shard else f for n, f in places(folder).items()}
        place(folder, found)
        (folder / shard).unlink()

    return spoil


def _link_out(folder: Path) -> None:
    shard = folder / min(places(folder).values())
    shard.rename(folder.parent / "secret.safetensors")
    shard.symlink_to(folder.parent / "secret.safetensors")


def _looping_link(folder: Path) -> None:
    (folder / "vocab.json").symlink_to(folder / "vocab.json")


def _config_link_out(folder: Path) -> None:
    (folder / "config.json").rename(folder.parent / "config.json")
    (folder / "config.json").symlink_to("../config.json")


def _adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")


def _adapter_weights(folder: Path) -> None:
    save_file({"a": torch.ones(1)}, folder / "adapter_model.safetensors")


def _quantiser(folder: Path) -> None:
    (folder / "hf_quant_config.json").write_text("{}", encoding="utf-8")


def _pickles(folder: Path) -> None:
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    torch.save(make_model().state_dict(), folder / "pytorch_model.bin")


def _index_list(folder: Path) -> None:
    place(folder, [1])


def _index_numbers(folder: Path) -> None:
    place(folder, {"model.norm.weight": 3})


def _index_nested(folder: Path) -> None:
    (folder / INDEX).write_text("[" * 100_000, encoding="utf-8")


def _eight_bits(folder: Path) -> None:
    shard = folder / places(folder)["model.norm.weight"]
    tensors = load_file(shard)
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, shard, metadata={"format": "pt"})


@MEMORIES
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_both, "holds both model.safetensors and model.safetensors.index.json"),
        (_stray_shard, "belong to no index: model-00099-of-00099.safetensors"),
        (_no_index, "but no model.safetensors.index.json"),
        (_shard_gone, "there is no such file"),
        (_unlisted_tensor, "1 tensors where model.safetensors.index.json does not place them"),
        (_wrong_place, "lacks model.norm.weight, which"),
        (_elsewhere("../secret.safetensors"), "no file of its folder"),
        (_elsewhere("/etc/passwd"), "no file of its folder"),
        (_elsewhere(".."), "no file of its folder"),
        (_elsewhere("a\0b"), "no file of its folder"),
        (_link_out, "leads out of its folder"),
        (_looping_link, "leads out of its folder"),
        (_config_link_out, "leads out of its folder"),
        (_adapter, "holds an adapter, adapter_config.json"),
        (_adapter_weights, "holds an adapter, adapter_model.safetensors"),
        (_quantiser, "hf_quant_config.json lies beside them"),
        (_pickles, "could run code when it is read"),
        (_index_list, "is no index of weights"),
        (_index_numbers, "no file of its folder"),
        (_index_nested, "nested too deeply"),
        (_eight_bits, "quantised ones cannot be read"),
    ],
)
def test_files_that_are_not_one_checkpoint_are_refused(
    tmp_path: Path, spoil: Callable[[Path], None], words: str, memory: Memory
) -> None:
    """The same sentence with a remedy, whichever way the model is to be read."""
    folder = sharded(tmp_path / "m")
    spoil(folder)
    with pytest.raises(ModelSourceError, match=words) as caught:
        load(ModelSource(id=str(folder), device="cpu", memory=memory))
    assert caught.value.hint and "\n" not in caught.value.message


@MEMORIES
def test_an_index_of_one_file_is_fine(tmp_path: Path, memory: Memory) -> None:
    """Some writers make an index for a single file; both say the same."""
    folder = single(tmp_path / "m")
    place(folder, dict.fromkeys(load_file(folder / SINGLE), SINGLE))
    model, _ = load(ModelSource(id=str(folder), device="cpu", memory=memory))
    assert fingerprint(model) == fingerprint(make_model())


@MEMORIES
def test_a_snapshot_of_the_hub_is_links_into_its_blobs(tmp_path: Path, memory: Memory) -> None:
    """The layout of the Hub's cache is read; so is a link to the snapshot itself."""
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for file in sharded(tmp_path / "m").iterdir():
        file.rename(blobs / f"hash-{file.name}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / f"hash-{file.name}")
    (tmp_path / "link").symlink_to(snapshot)
    for folder in (snapshot, tmp_path / "link"):
        model, _ = load(ModelSource(id=str(folder), device="cpu", memory=memory))
        assert fingerprint(model) == fingerprint(make_model())


@MEMORIES
def test_files_that_are_no_part_of_it_are_left_alone(tmp_path: Path, memory: Memory) -> None:
    """Weights in another naming, pictures and links that nobody reads do not matter."""
    folder = sharded(tmp_path / "m")
    save_file({"tok_embeddings.weight": torch.ones(2)}, folder / "consolidated.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    (folder / "picture.png").symlink_to("/etc/passwd")
    model, _ = load(ModelSource(id=str(folder), device="cpu", memory=memory))
    assert fingerprint(model) == fingerprint(make_model())
