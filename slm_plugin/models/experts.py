"""Experts that checkpoints name one by one, and the installed transformers holds in one tensor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from slm_plugin.errors import ModelSourceError
from slm_plugin.lazy import torch
from slm_plugin.models.families.family import Family
from slm_plugin.models.stored import Stored, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class StackedTensor:
    """All experts of a layer as one tensor: rows of one expert's parts, then the next one's.

    Attributes:
        parts: Stored tensors of every expert, in the order of their rows.
    """

    parts: tuple[tuple[StoredTensor, ...], ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape: experts, rows, columns."""
        rows = sum(part.shape[0] for part in self.parts[0])
        return (len(self.parts), rows, *self.parts[0][0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Number format in the file."""
        return self.parts[0][0].dtype

    @property
    def size(self) -> int:
        """Bytes in the file."""
        return sum(part.size for parts in self.parts for part in parts)

    def read(self) -> Tensor:
        """Read the tensor into fresh memory.

        Raises:
            ModelSourceError: A file is missing or truncated.
        """
        return torch.stack([torch.cat([part.read() for part in parts]) for parts in self.parts])


def stacked(stored: Mapping[str, StoredTensor], family: Family) -> dict[str, Stored]:
    """Stored tensors by the names of the installed transformers, experts of a layer as one.

    Raises:
        ModelSourceError: Experts of a layer are missing, or differ in shape.
    """
    if not family.experts:
        return dict(stored)
    gate, up, down = map(re.escape, family.experts)
    inside = re.escape(f".{family.stored_mlp}.")
    pattern = re.compile(rf"(.*{inside})experts\.([0-9]{{1,5}})\.({gate}|{up}|{down})\.weight")
    found: dict[str, Stored] = {}
    experts: dict[str, dict[tuple[int, str], StoredTensor]] = {}
    for name, tensor in stored.items():
        match = pattern.fullmatch(name)
        if match is None:
            found[_present(name, family)] = tensor
        else:
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
    gate, up, down = family.experts
    for layer, parts in experts.items():
        for made, names in (("gate_up_proj", (gate, up)), ("down_proj", (down,))):
            found[_present(f"{layer}experts.{made}", family)] = _stack(layer, parts, names)
    return found


def _stack(
    layer: str, parts: Mapping[tuple[int, str], StoredTensor], names: tuple[str, ...]
) -> StackedTensor:
    count = 1 + max(expert for expert, _ in parts)
    lost = [
        f"{layer}experts.{expert}.{name}.weight"
        for expert in range(count)
        for name in names
        if (expert, name) not in parts
    ]
    if lost:
        raise ModelSourceError(
            f"the checkpoint lacks weights of experts: {lost[0]}"
            + (f" and {len(lost) - 1} more" if len(lost) > 1 else ""),
            hint="the checkpoint was not copied or written whole",
        )
    rows = tuple(tuple(parts[expert, name] for name in names) for expert in range(count))
    if len({tuple(part.shape for part in one) for one in rows}) > 1:
        raise ModelSourceError(
            f"experts of {layer.rstrip('.')} differ in shape",
            hint="the checkpoint is damaged",
        )
    return StackedTensor(rows)


def _present(name: str, family: Family) -> str:
    """A name in a checkpoint as the installed transformers has it."""
    return name.replace(f".{family.stored_mlp}.", f".{family.mlp[0]}.", 1)
