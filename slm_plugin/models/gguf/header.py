"""The header of a GGUF file: its metadata and where its tensors lie.

The `gguf` package trusts every count in a file: a damaged one costs it all memory, or hours. Here
each count is compared with the bytes that are left before it is believed. After that the package
can read the same file safely, for the comparison in `verification`.

Source: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

from slm_plugin.errors import ModelSourceError
from slm_plugin.lazy import np

DAMAGED = "the file is damaged or was not copied whole"
_OTHER_FORMAT = "convert the model again to a common format such as F16, Q8_0 or Q4_K"
_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_STRING, _ARRAY = 8, 9
_BOOL = 7
_U32, _U64 = "<I", "<Q"
# Number formats by GGUF's number for them, as `struct` and NumPy spell them.
_SCALARS = {
    **{0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: _U32, 5: "<i", 6: "<f", _BOOL: "<B"},
    **{10: _U64, 11: "<q", 12: "<d"},
}
_LONGEST_NAME = 1024
_MOST_DIMENSIONS = 4


@dataclass(frozen=True, slots=True)
class TensorPlace:
    """Where one tensor lies, and in which format.

    Attributes:
        file: The GGUF file.
        offset: First byte, from the beginning of the file.
        shape: Shape as PyTorch writes it, the fastest axis last.
        kind: The number of its format.
        kind_name: The name of its format, as ``Q4_K``.
        size: Bytes.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    kind: int
    kind_name: str
    size: int


@dataclass(frozen=True, slots=True)
class Header:
    """All metadata and tensor places of one file.

    Attributes:
        fields: Values by key: numbers, truth values, text, or lists of one of these.
        tensors: Places by name, in the order of the file.
    """

    fields: dict[str, Any]
    tensors: dict[str, TensorPlace]


def read_header(path: Path) -> Header:
    """Read the header of a GGUF file; no count in it is believed without the bytes behind it.

    Raises:
        ModelSourceError: The file cannot be read, is not GGUF of version 2 or 3 in little-endian
            order, is truncated or malformed, or holds a tensor format that cannot be dequantised.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _Cursor(path, data).header()
    except OSError as error:
        raise ModelSourceError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # mmap refuses an empty file.
        raise ModelSourceError(f"{path} is empty", hint=DAMAGED) from error


def shown(value: Any) -> str:
    """A value of any kind and length, short and in one line."""
    # A value may be millions of entries long: only its beginning is spelled out.
    text = repr(value[:64] if isinstance(value, list | str) else value)
    return text if len(text) < 60 else f"{text[:56]} ..."


class _Cursor:
    """A position in the bytes of a file, which never passes their end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.size = len(data)
        self.at = 0

    def header(self) -> Header:
        if self.data[:4] != _MAGIC:
            self.fail("is not a GGUF file", "give a file that begins with the letters GGUF")
        self.at = 4
        version = self.number(_U32, "the version")
        if version & 0xFFFF == 0 and version:
            self.fail("is a big-endian GGUF file", "convert it with gguf-convert-endian")
        if version not in _VERSIONS:
            self.fail(
                f"is GGUF version {version}, not one of 2 and 3",
                "convert the model again with a current llama.cpp",
            )
        # A tensor takes at least 24 bytes of the header, and a field 13.
        tensors = self.count("tensors", 24)
        fields = self.count("metadata fields", 13)
        values = self.fields(fields)
        alignment = values.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
            self.fail(
                f"states general.alignment {shown(alignment)}, not a power of two of at least 8"
            )
        return Header(values, self.tensors(tensors, alignment))

    def fields(self, count: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for _ in range(count):
            key = self.name("a metadata key")
            if key in found:
                self.fail(f"states {key} twice")
            found[key] = self.value(self.number(_U32, f"the type of {key}"), key)
        return found

    def value(self, kind: int, key: str) -> Any:
        if kind == _STRING:
            return self.text(key)
        if kind == _ARRAY:
            return self.array(key)
        if kind not in _SCALARS:
            self.fail(f"gives {key} the unknown type {kind}")
        number = self.number(_SCALARS[kind], key)
        return self.truth(number, key) if kind == _BOOL else number

    def array(self, key: str) -> list[Any]:
        kind = self.number(_U32, f"the type of {key}")
        if kind == _STRING:
            return [self.text(key) for _ in range(self.count(f"entries of {key}", 8))]
        if kind not in _SCALARS:
            self.fail(f"gives the entries of {key} the type {kind}, which cannot be read")
        dtype = np.dtype(_SCALARS[kind])
        size = self.count(f"entries of {key}", dtype.itemsize) * dtype.itemsize
        numbers: list[Any] = np.frombuffer(self.take(size, key), dtype).tolist()
        return [self.truth(number, key) for number in numbers] if kind == _BOOL else numbers

    def tensors(self, count: int, alignment: int) -> dict[str, TensorPlace]:
        listed = [self.tensor(alignment) for _ in range(count)]
        start = -(-self.at // alignment) * alignment
        found: dict[str, TensorPlace] = {}
        for name, place in listed:
            if name in found:
                self.fail(f"holds the tensor {name} twice")
            offset = start + place.offset
            if offset + place.size > self.size:
                self.fail(f"ends before its tensor {name} does")
            found[name] = TensorPlace(
                place.file, offset, place.shape, place.kind, place.kind_name, place.size
            )
        self.check_overlap(found)
        return found

    def tensor(self, alignment: int) -> tuple[str, TensorPlace]:
        name = self.name("the name of a tensor")
        dimensions = self.number(_U32, f"the dimensions of {name}")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            self.fail(f"gives the tensor {name} {dimensions} dimensions")
        shape = tuple(self.number(_U64, f"the shape of {name}") for _ in range(dimensions))[::-1]
        kind = self.number(_U32, f"the format of {name}")
        offset = self.number(_U64, f"the place of {name}")
        if min(shape) < 1 or math.prod(shape) >= 1 << 62:
            self.fail(f"gives the tensor {name} the shape {list(shape)}")
        if offset % alignment:
            self.fail(f"places the tensor {name} off its alignment of {alignment} bytes")
        kind_name, block, size = _format(kind)
        if block == 0:
            self.fail(f"stores {name} as {kind_name}, which cannot be dequantised", _OTHER_FORMAT)
        if shape[-1] % block:
            self.fail(
                f"stores {name} of shape {list(shape)} as {kind_name}, "
                f"whose rows are whole blocks of {block}"
            )
        size *= math.prod(shape) // block
        return name, TensorPlace(self.path, offset, shape, kind, kind_name, size)

    def check_overlap(self, tensors: dict[str, TensorPlace]) -> None:
        end, before = 0, ""
        for name, place in sorted(tensors.items(), key=lambda item: item[1].offset):
            if place.offset < end:
                self.fail(f"places the tensor {name} inside {before}")
            end, before = place.offset + place.size, name

    def count(self, what: str, least_bytes: int) -> int:
        number: int = self.number(_U64, f"the number of {what}")
        if number > (self.size - self.at) // least_bytes:
            self.fail(f"claims {number:,} {what}, more than it has bytes for")
        return number

    def name(self, what: str) -> str:
        """A name that a message can show in one line."""
        length = self.number(_U64, what)
        if length > _LONGEST_NAME:
            self.fail(f"gives {what} a length of {length:,} bytes")
        name = self.decoded(length, what)
        if not name.isprintable():
            self.fail(f"writes {what} as {shown(name)}")
        return name

    def text(self, key: str) -> str:
        return self.decoded(self.number(_U64, key), key)

    def decoded(self, length: int, key: str) -> str:
        try:
            return str(self.take(length, key), "utf-8")
        except UnicodeDecodeError:
            self.fail(f"holds text that is not UTF-8 in {key}")

    def number(self, form: str, key: str) -> Any:
        number: Any = struct.unpack(form, self.take(struct.calcsize(form), key))[0]
        return number

    def truth(self, number: int, key: str) -> bool:
        if number not in (0, 1):
            self.fail(f"gives {key} the truth value {number}")
        return bool(number)

    def take(self, size: int, key: str) -> bytes:
        if size > self.size - self.at:
            self.fail(f"ends in the middle of {key}")
        self.at += size
        return self.data[self.at - size : self.at]

    def fail(self, what: str, hint: str = DAMAGED) -> NoReturn:
        raise ModelSourceError(f"{self.path} {what}", hint=hint)


@cache
def _format(kind: int) -> tuple[str, int, int]:
    """Name of a tensor format, values in a block, bytes of a block; no values if unreadable."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, dequantize

    try:
        known = GGMLQuantizationType(kind)
    except ValueError:
        return f"the unknown format {kind}", 0, 0
    block, size = GGML_QUANT_SIZES.get(known, (0, 0))
    try:
        dequantize(np.zeros((1, size), np.uint8), known)
    except NotImplementedError:
        block = 0
    return known.name, block, size
