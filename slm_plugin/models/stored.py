"""Tensors in safetensors files, read and written one at a time.

The `safetensors` library maps a whole file into memory to read it, and holds all tensors of a file
to write it. Neither fits under a hard limit of memory that is smaller than a shard, so the format
(a length, a JSON header, the bytes) is read and written plainly here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from slm_plugin.errors import ModelSourceError
from slm_plugin.lazy import torch
from slm_plugin.models.border import reason
from slm_plugin.models.json_file import parse_object

if TYPE_CHECKING:
    from torch import Tensor

FORMATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# What batch norms count and which positions there are: no weights, so no quantised ones.
COUNTERS = ("num_batches_tracked", "position_ids")
COUNTS = {"I64": "int64"}
_NAMES = {f"torch.{dtype}": name for name, dtype in FORMATS.items()}
# The limit of the safetensors library.
LONGEST_HEADER = 100_000_000
_DAMAGED = "the file is damaged or was not copied whole"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where one tensor lies.

    Attributes:
        file: The safetensors file.
        offset: First byte, from the beginning of the file.
        shape: Shape.
        dtype: Number format in the file.
    """

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize

    def read(self) -> Tensor:
        """Read the tensor into fresh memory.

        Raises:
            ModelSourceError: The file is missing or truncated.
        """
        data = torch.empty(math.prod(self.shape), dtype=self.dtype)
        room = _bytes(data)
        try:
            with self.file.open("rb") as file:
                file.seek(self.offset)
                got = file.readinto(room)
        except OSError as error:
            raise ModelSourceError(f"cannot read {self.file}: {error.strerror or error}") from error
        if got != len(room):
            raise ModelSourceError(f"{self.file} ends in the middle of a tensor", hint=_DAMAGED)
        return data.reshape(self.shape)


def write_tensors(
    file: Path,
    tensors: Mapping[str, Tensor],
    read: Callable[[Tensor], Tensor],
) -> None:
    """Write a safetensors file, byte for byte as ``safetensors.torch.save_file`` would.

    Args:
        file: The file.
        tensors: Names and stand-ins that have shape and number format, one format for all.
        read: Gives a stand-in's values; called for one tensor at a time.
    """
    names = sorted(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        stub = tensors[name]
        begin, end = end, end + stub.numel() * stub.dtype.itemsize
        header[name] = {
            "dtype": _NAMES[str(stub.dtype)],
            "shape": list(stub.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            out.write(_bytes(read(tensors[name]).detach().cpu().contiguous()))


class Stored(Protocol):
    """A tensor in files, in one piece or in several."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""

    @property
    def dtype(self) -> torch.dtype:
        """Number format in the files."""

    @property
    def size(self) -> int:
        """Bytes in the files."""

    def read(self) -> Tensor:
        """Read the tensor into fresh memory."""


def are_equal(one: Stored, other: Stored) -> bool:
    """Whether two tensors hold the same values.

    Raises:
        ModelSourceError: A file is missing or truncated.
    """
    if one.shape != other.shape:
        return False
    common = torch.promote_types(one.dtype, other.dtype)
    return torch.equal(one.read().to(common), other.read().to(common))


def total_bytes(tensors: Iterable[Stored]) -> int:
    """Bytes of tensors as they are stored."""
    return sum(tensor.size for tensor in tensors)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file by name; only its header is read.

    Raises:
        ModelSourceError: The file cannot be read, is malformed, or holds quantised weights.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if not 2 <= length <= min(size - 8, LONGEST_HEADER):
                raise ModelSourceError(f"{file} is no safetensors file", hint=_DAMAGED)
            entries = parse_object(opened.read(length))
        entries.pop("__metadata__", None)
        found = {name: _entry(file, name, 8 + length, size, e) for name, e in entries.items()}
    except OSError as error:
        raise ModelSourceError(f"cannot read {file}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelSourceError(
            f"{file} is no safetensors file: {reason(error)}", hint=_DAMAGED
        ) from error
    end = 8 + length
    # As the safetensors library demands: no holes, nothing shared, nothing left over.
    for tensor in sorted(found.values(), key=lambda tensor: (tensor.offset, tensor.size)):
        if tensor.offset != end:
            raise ModelSourceError(f"the tensors of {file} overlap or leave holes", hint=_DAMAGED)
        end += tensor.size
    if end != size:
        raise ModelSourceError(f"{file} is longer than its header says", hint=_DAMAGED)
    return found


def _entry(file: Path, name: str, start: int, size: int, entry: dict[str, Any]) -> StoredTensor:
    formats = FORMATS | COUNTS if name.rpartition(".")[2] in COUNTERS else FORMATS
    if entry["dtype"] not in formats:
        raise ModelSourceError(
            f"{file} holds weights in the format {entry['dtype']}: quantised ones cannot be read",
            hint=f"dequantise them first; read are {', '.join(FORMATS)}",
        )
    shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
    if any(type(number) is not int or number < 0 for number in (*shape, begin, end)):
        raise ValueError("a shape or an offset is no count")
    dtype = getattr(torch, formats[entry["dtype"]])
    if end - begin != math.prod(shape) * dtype.itemsize or start + end > size:
        raise ModelSourceError(f"{file} is shorter than its header says", hint=_DAMAGED)
    return StoredTensor(file, start + begin, shape, dtype)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, shared."""
    return tensor.flatten().view(torch.uint8).numpy().data
