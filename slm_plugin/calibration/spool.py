"""Tensors kept in a temporary file: what is captured from a model would fill memory otherwise."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_plugin.errors import OutputError
from slm_plugin.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class _Entry:
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


class Spool:
    """A growing list of tensors on disk; each read gives a fresh tensor on its first device.

    The file has no name and goes with the object, also when the process is killed. It lies where
    `tempfile` puts it: set ``TMPDIR`` to move it.
    """

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile(prefix="slm-plugin-")  # noqa: SIM115 - lives with us
        self._entries: list[_Entry] = []

    def append(self, tensor: Tensor) -> None:
        """Write one tensor.

        Raises:
            OutputError: The temporary folder is full.
        """
        data = tensor.detach().cpu().contiguous()
        offset = self._file.seek(0, 2)
        try:
            self._file.write(_bytes(data))
            self._file.flush()
        except OSError as error:
            raise OutputError(
                f"cannot keep captured activations in {tempfile.gettempdir()}: {error.strerror}",
                hint="free some space there or set TMPDIR to another folder",
            ) from error
        self._entries.append(_Entry(offset, tuple(data.shape), data.dtype, tensor.device))

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        entry = self._entries[index]
        self._file.seek(entry.offset)
        data = torch.empty(math.prod(entry.shape), dtype=entry.dtype)
        self._file.readinto(_bytes(data))
        return data.reshape(entry.shape).to(entry.device)


@dataclass(frozen=True, slots=True, eq=False)
class Projected:
    """Stored tensors, each of which is read in other coordinates of its last axis.

    Attributes:
        states: The tensors.
        basis: The vectors of the coordinates in its columns, ``(features, coordinates)``.
    """

    states: Spool | Projected
    basis: Tensor

    def __len__(self) -> int:
        return len(self.states)

    def __iter__(self) -> Iterator[Tensor]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Tensor:
        return in_coordinates(self.states[index], self.basis)


def in_coordinates(states: Tensor, basis: Tensor) -> Tensor:
    """States times a basis, ``(..., coordinates)``, on the CPU, in the basis's precision."""
    found: Tensor = states.to("cpu", basis.dtype) @ basis
    return found.to(states)


def _bytes(tensor: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, shared."""
    return tensor.flatten().view(torch.uint8).numpy().data
