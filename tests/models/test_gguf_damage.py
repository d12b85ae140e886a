"""Damaged GGUF files: one error, in little time and memory, whatever the bytes say."""

from __future__ import annotations

import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from slm_plugin.errors import ModelSourceError, SlmError
from slm_plugin.models.gguf import read_gguf
from slm_plugin.models.gguf.header import read_header
from tests.models.gguf_files import write_gguf, write_raw


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The bytes of a good file."""
    return write_gguf(tmp_path_factory.mktemp("gguf") / "m.gguf").read_bytes()


def refusal(path: Path, content: bytes) -> str:
    """What reading such bytes says."""
    path.write_bytes(content)
    with pytest.raises(ModelSourceError) as caught:
        read_gguf(path)
    assert "\n" not in caught.value.message
    return str(caught.value)


def text(value: str | bytes) -> bytes:
    """A string as GGUF stores it."""
    value = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(value)) + value


def header(tensors: int = 0, fields: int = 0, version: int = 3) -> bytes:
    """The first 24 bytes."""
    return b"GGUF" + struct.pack("<IQQ", version, tensors, fields)


def test_a_file_cut_anywhere_is_refused(whole: bytes, tmp_path: Path) -> None:
    """At every length of the first bytes and at many later ones."""
    cuts = [*range(64), *range(64, len(whole), 997), len(whole) - 1]
    for cut in cuts:
        refusal(tmp_path / "m.gguf", whole[:cut])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"GG", "not a GGUF file"),
        (b"PK\x03\x04" + bytes(100), "not a GGUF file"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (header(version=1), "version 1"),
        (header(version=9), "version 9"),
        (header(), "states no general.architecture"),
        (header(tensors=1 << 63), "tensors, more than it has bytes for"),
        (header(fields=1 << 62), "metadata fields, more than it has bytes for"),
        (header(fields=1) + text("k") + struct.pack("<IQ", 8, 1 << 60), "in the middle of k"),
        (header(fields=1) + struct.pack("<Q", 1 << 40) + bytes(40), "a metadata key"),
        (header(fields=1) + text(b"\xff\xfe") + struct.pack("<IB", 7, 1) + b"xx", "not UTF-8"),
        (header(fields=1) + text("a\n\x1b[31mb") + bytes(20), r"key as 'a\n\x1b[31mb'"),
        (header(fields=1) + text("k") + struct.pack("<IB", 7, 2) + bytes(9), "truth value 2"),
        (header(fields=1) + text("k") + struct.pack("<I", 99) + bytes(9), "unknown type 99"),
        (
            header(fields=1) + text("k") + struct.pack("<IIQ", 9, 9, 1) + bytes(20),
            "entries of k the type 9",
        ),
        (
            header(fields=1) + text("k") + struct.pack("<IIQ", 9, 0, 1 << 61) + bytes(20),
            "entries of k, more than it has bytes for",
        ),
        (
            header(fields=1) + text("k") + struct.pack("<IIQ", 9, 8, 1 << 50) + bytes(20),
            "entries of k, more than it has bytes for",
        ),
        (header(fields=2) + (text("k") + struct.pack("<IB", 0, 1)) * 2, "states k twice"),
    ],
)
def test_what_is_wrong_with_a_header_is_said(content: bytes, message: str, tmp_path: Path) -> None:
    """Wrong kind, wrong order of bytes, absurd counts, types that do not exist."""
    assert message in refusal(tmp_path / "m.gguf", content)


def tensor(name: str, shape: list[int], kind: int = 0, offset: int = 0) -> bytes:
    """The entry of a tensor."""
    return (
        text(name)
        + struct.pack("<I", len(shape))
        + struct.pack(f"<{len(shape)}Q", *shape)
        + struct.pack("<IQ", kind, offset)
    )


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([tensor("t", [8]), tensor("t", [8], offset=32)], "tensor t twice"),
        ([tensor("t", [8]), tensor("u", [8])], "places the tensor u inside t"),
        ([tensor("t", [8], offset=4)], "off its alignment"),
        ([tensor("t", [8], offset=1 << 40)], "ends before its tensor t"),
        ([tensor("t", [1 << 40])], "ends before its tensor t"),
        ([tensor("t", [1 << 40, 1 << 40])], "the shape"),
        ([tensor("t", [0])], "the shape"),
        ([tensor("t", [])], "0 dimensions"),
        ([tensor("t", [1] * 9)], "9 dimensions"),
        ([tensor("t", [8], kind=77)], "unknown format 77"),
        ([tensor("t", [8], kind=31)], "unknown format 31"),
        ([tensor("t", [8], kind=26)], "as I32"),
        ([tensor("t", [33], kind=8)], "whole blocks of 32"),
    ],
)
def test_what_is_wrong_with_the_tensors_is_said(
    entries: list[bytes], message: str, tmp_path: Path
) -> None:
    """Duplicates, overlaps, places outside the file, absurd shapes, unknown formats."""
    content = header(tensors=len(entries)) + b"".join(entries) + bytes(256)
    assert message in refusal(tmp_path / "m.gguf", content)


@pytest.mark.parametrize("alignment", [0, 3, 4, 48, "32"])
def test_an_alignment_that_is_none_is_refused(alignment: Any, tmp_path: Path) -> None:
    """It must be a power of two."""
    write_raw(tmp_path / "m.gguf", "llama", {"general.alignment": alignment}, {})
    with pytest.raises(ModelSourceError, match=r"general\.alignment"):
        read_header(tmp_path / "m.gguf")


def test_a_larger_alignment_is_obeyed(tmp_path: Path) -> None:
    """Tensors begin where the file says."""
    read_gguf(write_gguf(tmp_path / "m.gguf", fields={"general.alignment": 32}))


def test_a_model_without_tensors_is_refused(tmp_path: Path) -> None:
    """A vocabulary alone, as llama.cpp's tests use them."""
    write_raw(tmp_path / "m.gguf", "llama", {"llama.context_length": 8}, {})
    with pytest.raises(ModelSourceError):
        read_gguf(tmp_path / "m.gguf")


def test_a_folder_and_a_closed_file_are_refused(tmp_path: Path) -> None:
    """What cannot be opened is an error of the source."""
    with pytest.raises(ModelSourceError, match="cannot read"):
        read_gguf(tmp_path)
    with pytest.raises(ModelSourceError, match="cannot read"):
        read_gguf(tmp_path / "nowhere.gguf")


def test_changed_bytes_never_give_another_error(whole: bytes, tmp_path: Path) -> None:
    """Random changes of the header: a model, or an error with a name."""
    draw = random.Random(0)
    end = read_header_end(whole)
    path = tmp_path / "m.gguf"
    for _ in range(150):
        content = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            at = draw.randrange(4, end)
            width = draw.choice([1, 1, 4, 8])
            content[at : at + width] = draw.choice(
                [draw.randbytes(width), b"\xff" * width, bytes(width)]
            )
        path.write_bytes(content)
        try:
            read_gguf(path)
        except SlmError as error:
            assert "\n" not in error.message


def read_header_end(content: bytes) -> int:
    """Where the tensors of a file begin, near enough."""
    return content.index(b"output_norm.weight") + 60


def test_changed_fields_never_give_another_error(tmp_path: Path) -> None:
    """Values of another kind under every key."""
    from tests.models.gguf_files import byte_level, make_gguf_model, network_fields, token_fields

    keys = [*network_fields(make_gguf_model(), "llama"), *token_fields(byte_level(), "gpt-2")]
    odd: list[Any] = [-1, 2**32 - 1, 1e30, float("nan"), "", "x" * 300, True, [1, 2], ["a"]]
    draw = random.Random(0)
    for key in keys:
        for value in draw.sample(odd, 3):
            path = write_gguf(tmp_path / "m.gguf", fields={key: value})
            try:
                read_gguf(path)
            except SlmError as error:
                assert "\n" not in error.message


def test_trailing_bytes_do_no_harm(whole: bytes, tmp_path: Path) -> None:
    """As some tools leave padding."""
    (tmp_path / "m.gguf").write_bytes(whole + bytes(1000))
    model, _ = read_gguf(tmp_path / "m.gguf")
    assert np.isfinite(model.lm_head.weight.detach().numpy()).all()
