"""Reading and writing safetensors one tensor at a time, against the safetensors library."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from slm_plugin.errors import ModelSourceError
from slm_plugin.models.stored import total_bytes, write_tensors
from slm_plugin.models.weight_files import INDEX, SINGLE, stored_tensors
from tests.tiny import make_model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_a_file_is_read_as_the_library_reads_it(tmp_path: Path, dtype: torch.dtype) -> None:
    """Every tensor has the library's values, scalars and empty ones included."""
    made = {"b": torch.randn(3, 5), "a": torch.randn(7), "one": torch.tensor(2.5)}
    made = {name: tensor.to(dtype) for name, tensor in {**made, "none": torch.empty(0, 4)}.items()}
    save_file(made, tmp_path / SINGLE, metadata={"format": "pt"})
    found = stored_tensors(tmp_path)
    expected = load_file(tmp_path / SINGLE)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        read = found[name].read()
        assert read.dtype == dtype and torch.equal(read, tensor)
    assert total_bytes(found.values()) == sum(t.numel() * t.element_size() for t in made.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_is_written_as_the_library_writes_it(tmp_path: Path, dtype: torch.dtype) -> None:
    """Same bytes, header and padding included, whatever the order and the names."""
    made = {"z.weight": torch.randn(4, 3), "a": torch.randn(5), "\u00e9": torch.randn(2, 2, 2)}
    made = {name: tensor.to(dtype) for name, tensor in made.items()}
    save_file(made, tmp_path / "theirs", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours", made, lambda tensor: tensor)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_shards_are_found_through_the_index(tmp_path: Path) -> None:
    """All tensors of a sharded checkpoint are there, each from its own file."""
    model = make_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    found = stored_tensors(tmp_path)
    assert len({tensor.file for tensor in found.values()}) > 2
    for name, parameter in model.named_parameters():
        assert torch.equal(found[name].read(), parameter)


def _no_weights(folder: Path) -> None:
    (folder / SINGLE).unlink()


def _no_header(folder: Path) -> None:
    (folder / SINGLE).write_bytes(b"not safetensors at all")


def _half(folder: Path) -> None:
    whole = (folder / SINGLE).read_bytes()
    (folder / SINGLE).write_bytes(whole[: len(whole) // 2])


def _garbled(folder: Path) -> None:
    whole = bytearray((folder / SINGLE).read_bytes())
    whole[8:12] = b"oops"
    (folder / SINGLE).write_bytes(bytes(whole))


def _integers(folder: Path) -> None:
    save_file({"a": torch.ones(3, dtype=torch.int8)}, folder / SINGLE)


def _bad_index(folder: Path) -> None:
    (folder / SINGLE).rename(folder / "model-00001-of-00001.safetensors")
    (folder / INDEX).write_text("{}", encoding="utf-8")


def _lying_index(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"b": SINGLE}}), encoding="utf-8")


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (_no_weights, "holds neither model.safetensors nor"),
        (_no_header, "is no safetensors file"),
        (_half, "is shorter than its header says"),
        (_garbled, "is no safetensors file"),
        (_integers, "holds weights in the format I8"),
        (_bad_index, "is no index of weights"),
        (_lying_index, "lacks b, which"),
    ],
)
def test_damage_is_named_in_one_sentence(tmp_path: Path, spoil: object, words: str) -> None:
    """What is wrong with a folder is said before a weight is used."""
    save_file({"a": torch.randn(40)}, tmp_path / SINGLE)
    spoil(tmp_path)  # type: ignore[operator]
    with pytest.raises(ModelSourceError, match=words):
        stored_tensors(tmp_path)


@pytest.mark.parametrize(("keep", "words"), [(None, "cannot read"), (60, "ends in the middle")])
def test_a_file_that_shrinks_later_is_an_error(
    tmp_path: Path, keep: int | None, words: str
) -> None:
    """A tensor is never made of what happened to be in memory."""
    file = tmp_path / SINGLE
    save_file({"a": torch.randn(40)}, file)
    found = stored_tensors(tmp_path)["a"]
    whole = file.read_bytes()
    file.unlink()
    if keep is not None:
        file.write_bytes(whole[:-keep])
    with pytest.raises(ModelSourceError, match=words):
        found.read()
